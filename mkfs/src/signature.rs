//! Recognises what is already on a device, so that it is not overwritten by mistake.
//!
//! Places and magic numbers are those of the formats' own documents.

/// Bytes from the start of a device that [`recognise`] wants to see.
pub const WANTED_BYTES: usize = 128 << 10;

struct Signature {
    name: &'static str,
    offset: usize,
    magic: &'static [u8],
}

const SIGNATURES: &[Signature] = &[
    Signature { name: "a coppice filesystem", offset: 4096, magic: b"coppice fs super" },
    Signature { name: "an XFS filesystem", offset: 0, magic: b"XFSB" },
    Signature { name: "a btrfs filesystem", offset: 0x1_0040, magic: b"_BHRfS_M" },
    Signature {
        name: "a bcachefs filesystem",
        offset: 4096 + 24,
        magic: &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9, 0xd9, 0x6a, 0x60, 0xcf, 0x80, 0x3d, 0xf7, 0xef],
    },
    Signature {
        name: "a bcache device",
        offset: 4096 + 24,
        magic: &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81],
    },
    Signature { name: "a LUKS container", offset: 0, magic: b"LUKS\xba\xbe" },
    Signature { name: "a LVM physical volume", offset: 512, magic: b"LABELONE" },
    Signature { name: "a LVM physical volume", offset: 0, magic: b"LABELONE" },
    Signature { name: "a SquashFS filesystem", offset: 0, magic: b"hsqs" },
    Signature { name: "an F2FS filesystem", offset: 1024, magic: &[0x10, 0x20, 0xf5, 0xf2] },
    Signature { name: "an exFAT filesystem", offset: 3, magic: b"EXFAT   " },
    Signature { name: "an NTFS filesystem", offset: 3, magic: b"NTFS    " },
    Signature { name: "a FAT filesystem", offset: 54, magic: b"FAT1" },
    Signature { name: "a FAT filesystem", offset: 82, magic: b"FAT32" },
    Signature { name: "a QEMU qcow2 image", offset: 0, magic: b"QFI\xfb" },
    Signature { name: "an ISO 9660 filesystem", offset: 0x8001, magic: b"CD001" },
    Signature { name: "a swap area", offset: 4086, magic: b"SWAPSPACE2" },
    Signature { name: "a JFS filesystem", offset: 0x8000, magic: b"JFS1" },
    Signature { name: "a ReiserFS filesystem", offset: 0x1_0034, magic: b"ReIsEr" },
    Signature { name: "a Linux RAID member", offset: 4096, magic: &[0xfc, 0x4e, 0x2b, 0xa9] },
    Signature { name: "a GPT partition table", offset: 512, magic: b"EFI PART" },
    Signature { name: "a GPT partition table", offset: 4096, magic: b"EFI PART" },
];

/// What the first bytes of a device (up to [`WANTED_BYTES`]) are recognised as.
#[must_use]
pub fn recognise(start: &[u8]) -> Option<&'static str> {
    let has = |offset: usize, magic: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    if has(1024 + 0x38, &[0x53, 0xef]) {
        // ext2, 3 and 4 share a magic number; extents make the fourth, a journal the third.
        let feature = |offset: usize, bit: u8| start.get(1024 + offset).is_some_and(|byte| byte & bit != 0);
        return Some(match (feature(0x60, 0x40), feature(0x5c, 0x04)) {
            (true, _) => "an ext4 filesystem",
            (false, true) => "an ext3 filesystem",
            (false, false) => "an ext2 filesystem",
        });
    }
    if let Some(found) = SIGNATURES.iter().find(|signature| has(signature.offset, signature.magic)) {
        return Some(found.name);
    }
    let partitioned = has(510, &[0x55, 0xaa])
        && start.get(446..510).is_some_and(|table| {
            table.chunks(16).all(|entry| matches!(entry.first(), Some(0 | 0x80)))
                && table.chunks(16).any(|entry| entry.get(4).is_some_and(|kind| *kind != 0))
        });
    partitioned.then_some("a DOS partition table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_is_found_where_it_says() {
        for signature in SIGNATURES {
            let mut bytes = vec![0; WANTED_BYTES];
            bytes[signature.offset..signature.offset + signature.magic.len()].copy_from_slice(signature.magic);
            assert_eq!(recognise(&bytes), Some(signature.name));
        }
    }

    #[test]
    fn nothing_is_found_in_zeros_or_in_little() {
        assert_eq!(recognise(&[]), None);
        assert_eq!(recognise(&[0; 100]), None);
        assert_eq!(recognise(&vec![0; WANTED_BYTES]), None);
    }

    #[test]
    fn a_partition_table_needs_a_partition() {
        let mut bytes = vec![0; WANTED_BYTES];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(recognise(&bytes), None);
        bytes[446 + 4] = 0x83;
        assert_eq!(recognise(&bytes), Some("a DOS partition table"));
    }
}
