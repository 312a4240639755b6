//! `mkfs-coppice`: makes a filesystem on an image file or a disk.
//!
//! Chooses sizes ([`layout`]), refuses to destroy what it recognises ([`signature`]), and lets `coppicefs` write. Nothing on the target is
//! changed before everything was checked; an image that was created for a format that then fails is removed again.

#![forbid(unsafe_code)]

// `say!` and `complain!`, which end no program.
#[macro_use]
extern crate coppicefs;

pub mod cli;
pub mod layout;
pub mod signature;
