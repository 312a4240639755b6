//! A workload out of bytes: each operation does what the model says, nothing is shown but what was done, and a check finds nothing.

use std::sync::Arc;

use coppicefs::Error;
use coppicefs::device::{Image, SimDevice, SimOptions};

use crate::crash::Subject;
use crate::filesystem_subject::Coppice;
use crate::model::Model;
use crate::operation::{Operation, Way};

const DEVICE_BYTES: u64 = 8 << 20;
/// Bytes of one operation.
const OPERATION_BYTES: usize = 8;
const OPERATIONS_MAX: usize = 200;

fn path(byte: u8) -> String {
    let name = char::from(b'a' + byte % 5);
    match byte / 5 % 4 {
        0 => format!("/{name}"),
        1 => format!("/a/{name}"),
        2 => format!("/b/{name}"),
        _ => format!("/a/b/{name}"),
    }
}

fn operation(bytes: &[u8], tag: u32) -> Operation {
    let (one, other) = (path(bytes[1]), path(bytes[2]));
    let number = u64::from(u16::from_le_bytes([bytes[3], bytes[4]]));
    let length = u64::from(u16::from_le_bytes([bytes[5], bytes[6]])).max(1);
    let block = |number: u64| number / 4096 * 4096;
    let whole = block(length).max(4096);
    match bytes[0] % 26 {
        0 | 1 => Operation::Create { path: one, mode: 0o600 | number as u16 & 0o77 },
        2 => Operation::MakeDirectory { path: one, mode: 0o755 },
        3 => Operation::SymbolicLink { path: one, target: other },
        4 => Operation::Link { existing: one, path: other },
        5 => Operation::Unlink { path: one },
        6 => Operation::RemoveDirectory { path: one },
        7 => Operation::Rename { from: one, to: other },
        8 => Operation::Exchange { one, other },
        9..=12 => Operation::Write { path: one, offset: number, length, tag },
        13 => Operation::WriteAs { path: one, offset: block(number), length: whole, tag, way: Way::Direct },
        14 => Operation::WriteAs { path: one, offset: number, length, tag, way: Way::Synchronous },
        15 => Operation::Truncate { path: one, size: number },
        16 => Operation::Punch { path: one, offset: number, length },
        17 => Operation::Allocate { path: one, offset: number, length, keep_size: bytes[7] & 1 == 0 },
        18 => Operation::Zero { path: one, offset: number, length, keep_size: bytes[7] & 1 == 0 },
        19 => Operation::Collapse { path: one, offset: block(number), length: whole },
        20 => Operation::Insert { path: one, offset: block(number), length: whole },
        21 => Operation::SetXattr { path: one, name: "user.x".into(), value: "x".repeat(usize::from(bytes[7])) },
        22 => Operation::RemoveXattr { path: one, name: "user.x".into() },
        23 => Operation::Fsync { path: one },
        24 => Operation::Sync,
        _ => Operation::Settle,
    }
}

pub(super) fn operations(bytes: &[u8]) {
    let subject = Coppice::default();
    let device =
        SimDevice::from_image(Image::new(DEVICE_BYTES), SimOptions { block_bytes: 4096, ..SimOptions::default() });
    let device = Arc::new(device);
    subject.format(&device).expect("format");
    let mut mounted = subject.mount(&device, 1).expect("mount");
    let mut model = Model::new(4096);
    for (bytes, tag) in bytes.chunks_exact(OPERATION_BYTES).take(OPERATIONS_MAX).zip(1..) {
        let operation = operation(bytes, tag);
        let mut next = model.clone();
        let expected = next.begin(&operation);
        match mounted.perform(&operation) {
            Ok(()) => {
                expected.unwrap_or_else(|errno| panic!("{operation:?} should fail with {errno}"));
                next.acknowledge(&operation);
                model = next;
            }
            // There may be no space, for a file of any size.
            Err(Error::NoSpace(_)) => return,
            Err(error) => assert_eq!(expected, Err(error.errno()), "{operation:?}: {error}"),
        }
    }
    let tree = mounted.tree().unwrap_or_else(|error| panic!("{error}"));
    model.check_live(&tree).unwrap_or_else(|problem| panic!("{problem}"));
    mounted.unmount().unwrap_or_else(|error| panic!("unmount: {error}"));
    let problems = subject.check(&device).unwrap_or_else(|error| panic!("check: {error}"));
    assert!(problems.is_empty(), "{problems:?}");
    let mut mounted = subject.mount(&device, 2).unwrap_or_else(|error| panic!("again: {error}"));
    let again = mounted.tree().unwrap_or_else(|error| panic!("{error}"));
    assert!(again == tree, "a second mount shows something else");
}

/// Folders and files, and then of each kind some.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut random = super::Random::new(1);
    let begin: Vec<u8> =
        [[2, 0, 0, 0, 0, 0, 0, 0], [2, 6, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [9, 1, 0, 0, 0, 0xff, 0x7f, 0]]
            .concat();
    (0..26_u8)
        .map(|kind| {
            let mut bytes = begin.clone();
            for _ in 0..12 {
                let other = random.word().to_le_bytes();
                bytes.extend_from_slice(&other);
                bytes.extend_from_slice(&[
                    kind,
                    1,
                    other[2],
                    other[3],
                    other[4] & 0x1f,
                    other[5],
                    other[6] & 0x1f,
                    other[7],
                ]);
            }
            bytes
        })
        .collect()
}
