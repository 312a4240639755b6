//! btree.
