//! POSIX access control lists, in the encoding that Linux passes as extended attributes: what of them is the filesystem's work
//! (the kernel checks permissions by them). POSIX.1e draft 17, sections 23.1.2 and 23.3.

use rustix::io::Errno;

use crate::error::Result;
use crate::format::Reader;

/// Name of the attribute that holds a file's access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the attribute that holds what a directory gives to new files in it.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OWNER: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// One entry of an ACL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// Reads an ACL. The empty list means "none".
///
/// # Errors
/// `EOPNOTSUPP` for another version, `EINVAL` for what is no valid ACL.
pub fn decode(bytes: &[u8]) -> Result<Vec<AclEntry>> {
    let invalid = |_| crate::Error::Posix(Errno::INVAL);
    let mut reader = Reader::new("access control list", bytes);
    if reader.u32().map_err(invalid)? != VERSION {
        return Err(Errno::OPNOTSUPP.into());
    }
    let mut list = Vec::with_capacity(reader.remaining() / 8);
    while reader.remaining() > 0 {
        let tag = reader.u16().map_err(invalid)?;
        let permissions = reader.u16().map_err(invalid)?;
        let id = reader.u32().map_err(invalid)?;
        list.push(AclEntry { tag, permissions, id });
    }
    let count = |tag| list.iter().filter(|entry| entry.tag == tag).count();
    let is_known = list.iter().all(|entry| {
        entry.permissions <= 7 && matches!(entry.tag, USER_OWNER | USER | GROUP_OWNER | GROUP | MASK | OTHER)
    });
    let has_named = count(USER) + count(GROUP) > 0;
    let is_complete = count(USER_OWNER) == 1 && count(GROUP_OWNER) == 1 && count(OTHER) == 1;
    if list.is_empty() || (is_known && is_complete && count(MASK) <= 1 && (!has_named || count(MASK) == 1)) {
        Ok(list)
    } else {
        Err(Errno::INVAL.into())
    }
}

/// The attribute's value.
#[must_use]
pub fn encode(list: &[AclEntry]) -> Vec<u8> {
    let mut out = VERSION.to_le_bytes().to_vec();
    for entry in list {
        out.extend_from_slice(&entry.tag.to_le_bytes());
        out.extend_from_slice(&entry.permissions.to_le_bytes());
        out.extend_from_slice(&entry.id.to_le_bytes());
    }
    out
}

/// The nine permission bits that stand for this list, and whether they say all that it says.
#[must_use]
pub fn permissions(list: &[AclEntry]) -> (u32, bool) {
    let (mut owner, mut group, mut mask, mut other, mut is_exact) = (0, 0, None, 0, true);
    for entry in list {
        let bits = u32::from(entry.permissions);
        match entry.tag {
            USER_OWNER => owner = bits,
            GROUP_OWNER => group = bits,
            OTHER => other = bits,
            MASK => {
                mask = Some(bits);
                is_exact = false;
            }
            _ => is_exact = false,
        }
    }
    (owner << 6 | mask.unwrap_or(group) << 3 | other, is_exact)
}

/// Makes the list follow a chmod to these nine bits.
pub fn change_permissions(list: &mut [AclEntry], permissions: u32) {
    let bits = |shift: u32| u16::try_from(permissions >> shift & 7).unwrap_or(0);
    let group_tag = if list.iter().any(|entry| entry.tag == MASK) { MASK } else { GROUP_OWNER };
    for entry in list {
        match entry.tag {
            USER_OWNER => entry.permissions = bits(6),
            OTHER => entry.permissions = bits(0),
            tag if tag == group_tag => entry.permissions = bits(3),
            _ => {}
        }
    }
}

/// What a new file gets from its directory's default list when `permissions` were asked for: its access list, and its nine bits.
#[must_use]
pub fn inherit(default: &[AclEntry], permissions: u32) -> (Vec<AclEntry>, u32) {
    let mut list = default.to_vec();
    let (allowed, _) = self::permissions(&list);
    let granted = permissions & 0o777 & allowed;
    change_permissions(&mut list, granted);
    (list, granted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16, u32)]) -> Vec<AclEntry> {
        entries.iter().map(|&(tag, permissions, id)| AclEntry { tag, permissions, id }).collect()
    }

    #[test]
    fn a_minimal_list_is_the_mode() {
        let minimal = list(&[(USER_OWNER, 7, 0), (GROUP_OWNER, 5, 0), (OTHER, 1, 0)]);
        assert_eq!(permissions(&minimal), (0o751, true));
        assert_eq!(decode(&encode(&minimal)).unwrap(), minimal);
    }

    #[test]
    fn a_mask_stands_for_the_group_bits() {
        let mut long = list(&[(USER_OWNER, 7, 0), (USER, 7, 1000), (GROUP_OWNER, 5, 0), (MASK, 6, 0), (OTHER, 0, 0)]);
        assert_eq!(permissions(&long), (0o760, false));
        change_permissions(&mut long, 0o640);
        assert_eq!(permissions(&long), (0o640, false));
        assert_eq!(long[2].permissions, 5, "the owning group's entry stays where there is a mask");
        let (inherited, bits) = inherit(&long, 0o666);
        assert_eq!(bits, 0o640);
        assert_eq!(permissions(&inherited), (0o640, false));
    }

    #[test]
    fn bad_lists_are_refused() {
        assert!(decode(&[]).is_err());
        assert!(decode(&encode(&[])).unwrap().is_empty());
        assert!(decode(&encode(&list(&[(USER_OWNER, 7, 0)]))).is_err());
        assert!(
            decode(&encode(&list(&[(USER_OWNER, 7, 0), (GROUP_OWNER, 7, 0), (OTHER, 7, 0), (USER, 1, 1)]))).is_err()
        );
        assert!(decode(&encode(&list(&[(USER_OWNER, 8, 0), (GROUP_OWNER, 7, 0), (OTHER, 7, 0)]))).is_err());
    }
}
