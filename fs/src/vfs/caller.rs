//! What is known about who asks.

use super::types::Caller;

/// Whether the caller is root: fuser does not pass capabilities on.
pub(super) fn is_privileged(caller: &Caller) -> bool {
    caller.uid == 0
}

/// Whether the caller's process is in the group: by its filesystem group, or by what `/proc` says of its others.
pub(super) fn is_in_group(caller: &Caller, gid: u32) -> bool {
    if caller.gid == gid {
        return true;
    }
    if caller.pid == 0 {
        return false;
    }
    let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", caller.pid)) else { return false };
    is_in_groups_line(&status, gid)
}

fn is_in_groups_line(status: &str, gid: u32) -> bool {
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    groups.is_some_and(|groups| groups.split_whitespace().any(|group| group.parse() == Ok(gid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_line_is_read() {
        let status = "Name:\tx\nGid:\t1 1 1 1\nGroups:\t4 24 1000 \nVmPeak: 7\n";
        assert!(is_in_groups_line(status, 24));
        assert!(!is_in_groups_line(status, 2));
        assert!(!is_in_groups_line("", 2));
    }
}
