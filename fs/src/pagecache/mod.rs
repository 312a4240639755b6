//! pagecache.
