//! The namespace against a plain model: the same random operations, the same answers, the same tree, also after a remount.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::format::namespace::FileType;

#[derive(Clone, Debug)]
enum Operation {
    Create { directory: usize, name: usize },
    MakeDirectory { directory: usize, name: usize },
    Symlink { directory: usize, name: usize },
    Link { from: (usize, usize), directory: usize, name: usize },
    Unlink { directory: usize, name: usize },
    RemoveDirectory { directory: usize, name: usize },
    Rename { from: (usize, usize), to: (usize, usize), flags: u32 },
    Chmod { directory: usize, name: usize, mode: u32 },
    Remount,
    Crash,
}

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "a long name that is not like the others"];

fn operation() -> impl Strategy<Value = Operation> {
    let place = || (0..5_usize, 0..NAMES.len());
    prop_oneof![
        4 => place().prop_map(|(directory, name)| Operation::Create { directory, name }),
        4 => place().prop_map(|(directory, name)| Operation::MakeDirectory { directory, name }),
        1 => place().prop_map(|(directory, name)| Operation::Symlink { directory, name }),
        3 => (place(), place()).prop_map(|(from, (directory, name))| Operation::Link { from, directory, name }),
        4 => place().prop_map(|(directory, name)| Operation::Unlink { directory, name }),
        3 => place().prop_map(|(directory, name)| Operation::RemoveDirectory { directory, name }),
        8 => (place(), place(), prop_oneof![4 => Just(0_u32), 1 => Just(1), 2 => Just(2)])
            .prop_map(|(from, to, flags)| Operation::Rename { from, to, flags }),
        1 => (place(), 0..0o1000_u32).prop_map(|((directory, name), mode)| Operation::Chmod { directory, name, mode }),
        1 => Just(Operation::Remount),
        1 => Just(Operation::Crash),
    ]
}

#[derive(Clone, Debug)]
struct Node {
    file_type: FileType,
    links: u32,
    mode: u32,
    parent: u64,
    entries: BTreeMap<String, u64>,
}

#[derive(Clone, Debug)]
struct Model(BTreeMap<u64, Node>);

impl Model {
    fn directories(&self) -> Vec<u64> {
        let is_live = |node: &Node| node.file_type == FileType::Directory && node.links > 0;
        self.0.iter().filter(|(_, node)| is_live(node)).map(|(&id, _)| id).collect()
    }

    fn find(&self, directory: u64, name: &str) -> Result<u64, Errno> {
        self.0[&directory].entries.get(name).copied().ok_or(Errno::NOENT)
    }

    fn is_directory(&self, id: u64) -> bool {
        self.0[&id].file_type == FileType::Directory
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.0.get_mut(&id).unwrap()
    }

    fn free(&self, directory: u64, name: &str) -> Result<(), Errno> {
        if self.find(directory, name).is_ok() { Err(Errno::EXIST) } else { Ok(()) }
    }

    fn add(&mut self, directory: u64, name: &str, id: u64, file_type: FileType, mode: u32) {
        let is_directory = file_type == FileType::Directory;
        let links = if is_directory { 2 } else { 1 };
        self.0.insert(id, Node { file_type, links, mode, parent: directory, entries: BTreeMap::new() });
        self.node(directory).entries.insert(name.to_owned(), id);
        if is_directory {
            self.node(directory).links += 1;
        }
    }

    fn link(&mut self, id: u64, directory: u64, name: &str) -> Result<(), Errno> {
        if self.is_directory(id) {
            return Err(Errno::PERM);
        }
        self.free(directory, name)?;
        self.node(directory).entries.insert(name.to_owned(), id);
        self.node(id).links += 1;
        Ok(())
    }

    fn drop_name(&mut self, id: u64) {
        let is_directory = self.is_directory(id);
        let node = self.node(id);
        node.links = if is_directory { 0 } else { node.links - 1 };
        if node.links == 0 {
            self.0.remove(&id);
        }
    }

    fn unlink(&mut self, directory: u64, name: &str) -> Result<(), Errno> {
        let id = self.find(directory, name)?;
        if self.is_directory(id) {
            return Err(Errno::ISDIR);
        }
        self.node(directory).entries.remove(name);
        self.drop_name(id);
        Ok(())
    }

    fn remove_directory(&mut self, directory: u64, name: &str) -> Result<(), Errno> {
        let id = self.find(directory, name)?;
        if !self.is_directory(id) {
            return Err(Errno::NOTDIR);
        }
        if !self.0[&id].entries.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.node(directory).entries.remove(name);
        self.node(directory).links -= 1;
        self.drop_name(id);
        Ok(())
    }

    fn is_below(&self, id: u64, mut directory: u64) -> bool {
        loop {
            if directory == id {
                return true;
            }
            if directory == ROOT {
                return false;
            }
            directory = self.0[&directory].parent;
        }
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), Errno> {
        let source = self.find(from.0, from.1)?;
        let target = self.find(to.0, to.1).ok();
        match (flags, target) {
            (1, Some(_)) => return Err(Errno::EXIST),
            (2, None) => return Err(Errno::NOENT),
            _ => {}
        }
        if target == Some(source) {
            return Ok(());
        }
        if self.is_directory(source) && self.is_below(source, to.0) {
            return Err(Errno::INVAL);
        }
        let moved_directories = |model: &mut Self, id: u64, from: u64, to: u64| {
            if model.is_directory(id) {
                model.node(from).links -= 1;
                model.node(to).links += 1;
            }
            model.node(id).parent = to;
        };
        if let (Some(target), 2) = (target, flags) {
            if self.is_directory(target) && self.is_below(target, from.0) {
                return Err(Errno::INVAL);
            }
            self.node(from.0).entries.insert(from.1.to_owned(), target);
            self.node(to.0).entries.insert(to.1.to_owned(), source);
            moved_directories(self, source, from.0, to.0);
            moved_directories(self, target, to.0, from.0);
            return Ok(());
        }
        if let Some(target) = target {
            match (self.is_directory(source), self.is_directory(target)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.0[&target].entries.is_empty() => return Err(Errno::NOTEMPTY),
                (true, true) => self.node(to.0).links -= 1,
                (false, false) => {}
            }
            self.drop_name(target);
        }
        self.node(from.0).entries.remove(from.1);
        self.node(to.0).entries.insert(to.1.to_owned(), source);
        moved_directories(self, source, from.0, to.0);
        Ok(())
    }
}

fn check(mount: &Mount, model: &Model) {
    for directory in model.directories() {
        let node = &model.0[&directory];
        let attributes = mount.attributes(directory);
        assert_eq!(attributes.link_count, node.links, "links of directory {directory}");
        assert_eq!(attributes.size_bytes, node.entries.len() as u64, "size of directory {directory}");
        let mut listed = mount.list(directory);
        assert_eq!(listed[..2], [(".".to_owned(), directory), ("..".to_owned(), node.parent)]);
        let mut names = listed.split_off(2);
        names.sort();
        let expected: Vec<(String, u64)> = node.entries.iter().map(|(name, &id)| (name.clone(), id)).collect();
        assert_eq!(names, expected, "directory {directory}");
        for (name, id) in names {
            assert_eq!(mount.lookup(directory, &name), Some(id));
            let attributes = mount.attributes(id);
            let expected = &model.0[&id];
            assert_eq!(
                (attributes.file_type, attributes.link_count, u32::from(attributes.permissions)),
                (expected.file_type, expected.links, expected.mode),
                "inode {id} as {name}"
            );
            mount.vfs().forget(id, 1);
        }
    }
}

fn run(operations: &[Operation], seed: u64) {
    let mut mount = Mount::simulated(seed);
    let root = Node { file_type: FileType::Directory, links: 2, mode: 0o755, parent: ROOT, entries: BTreeMap::new() };
    let mut model = Model(BTreeMap::from([(ROOT, root)]));
    for operation in operations {
        let directories = model.directories();
        let place = |&(directory, name): &(usize, usize)| (directories[directory % directories.len()], NAMES[name]);
        let agree = |real: Result<()>, expected: Result<(), Errno>| {
            assert_eq!(
                real.as_ref().map_err(Error::errno),
                expected.as_ref().map_err(|errno| *errno),
                "{operation:?}: {real:?}"
            );
        };
        let vfs = mount.vfs();
        match operation {
            Operation::Create { directory, name }
            | Operation::Symlink { directory, name }
            | Operation::MakeDirectory { directory, name } => {
                let (directory, name) = place(&(*directory, *name));
                let (entry, file_type, mode) = match operation {
                    Operation::Create { .. } => {
                        (vfs.mknod(&USER, directory, OsStr::new(name), 0o100_666, 0), FileType::Regular, 0o644)
                    }
                    Operation::Symlink { .. } => {
                        (vfs.symlink(&USER, directory, OsStr::new(name), b"somewhere"), FileType::Symlink, 0o777)
                    }
                    _ => (vfs.mkdir(&USER, directory, OsStr::new(name), 0o777), FileType::Directory, 0o755),
                };
                let expected = model.free(directory, name);
                agree(entry.as_ref().map(|_| ()).map_err(Clone::clone), expected);
                if let Ok(entry) = entry {
                    model.add(directory, name, entry.attributes.node, file_type, mode);
                    vfs.forget(entry.attributes.node, 1);
                }
            }
            Operation::Link { from, directory, name } => {
                let (from, (directory, name)) = (place(from), place(&(*directory, *name)));
                let Ok(id) = model.find(from.0, from.1) else { continue };
                let real = vfs.link(&USER, id, directory, OsStr::new(name)).map(|_| vfs.forget(id, 1));
                agree(real, model.link(id, directory, name));
            }
            Operation::Unlink { directory, name } => {
                let (directory, name) = place(&(*directory, *name));
                agree(vfs.unlink(&USER, directory, OsStr::new(name)), model.unlink(directory, name));
            }
            Operation::RemoveDirectory { directory, name } => {
                let (directory, name) = place(&(*directory, *name));
                agree(vfs.rmdir(&USER, directory, OsStr::new(name)), model.remove_directory(directory, name));
            }
            Operation::Rename { from, to, flags } => {
                let (from, to) = (place(from), place(to));
                let real = vfs.rename(&USER, from.0, OsStr::new(from.1), to.0, OsStr::new(to.1), *flags);
                agree(real, model.rename(from, to, *flags));
            }
            Operation::Chmod { directory, name, mode } => {
                let (directory, name) = place(&(*directory, *name));
                let Ok(id) = model.find(directory, name) else { continue };
                let changes = SetAttributes { mode: Some(*mode), ..SetAttributes::default() };
                vfs.set_attributes(&USER, id, &changes).unwrap();
                model.node(id).mode = *mode;
            }
            Operation::Remount => mount.reopen(),
            Operation::Crash => {
                vfs.sync().unwrap();
                mount.crash();
            }
        }
    }
    check(&mount, &model);
    mount.vfs().wait_for_deletions().unwrap();
    mount.reopen();
    check(&mount, &model);
    let inodes = mount.filesystem.as_ref().unwrap().totals().get(crate::format::journal::AccountingCounter::Inodes);
    assert_eq!(inodes, i64::try_from(model.0.len()).unwrap(), "inodes without names are left");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn names_are_as_in_a_model(operations in prop::collection::vec(operation(), 1..120), seed: u64) {
        run(&operations, seed);
    }
}
