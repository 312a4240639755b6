//! The only user of bincode: variable, versioned records that are not hot (superblock sections, checkpoint records, inodes).
//!
//! The configuration is fixed here for ever: little-endian, variable-length integers. A record must consume all its bytes, and
//! decoding is limited, so that damaged lengths cannot ask for memory.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};

use crate::error::Corruption;

/// Largest record in bytes.
pub const LIMIT_BYTES: usize = 1 << 20;

type Config = Configuration<LittleEndian, Varint, Limit<LIMIT_BYTES>>;

const CONFIG: Config =
    bincode::config::standard().with_little_endian().with_variable_int_encoding().with_limit::<LIMIT_BYTES>();

/// Encodes a record.
///
/// # Errors
/// If it is larger than [`LIMIT_BYTES`].
pub fn encode<T: bincode::Encode>(what: &'static str, record: &T) -> Result<Vec<u8>, Corruption> {
    bincode::encode_to_vec(record, CONFIG).map_err(|error| Corruption::new(what, format!("cannot be encoded: {error}")))
}

/// Decodes a record that takes up all of `bytes`.
///
/// # Errors
/// If it is not one, or bytes are left over.
pub fn decode<T: bincode::Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, Corruption> {
    match bincode::decode_from_slice::<T, Config>(bytes, CONFIG) {
        Ok((record, used)) if used == bytes.len() => Ok(record),
        Ok((_, used)) => Err(Corruption::new(what, format!("{} bytes left over after {used}", bytes.len() - used))),
        Err(error) => Err(Corruption::new(what, error.to_string())),
    }
}
