//! Counters, named in one table, one set for each filesystem. Relaxed atomics: reading them is a snapshot, not a barrier.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident = $text:literal),* $(,)?) => {
        /// All counters of one filesystem.
        #[derive(Debug, Default)]
        pub struct Metrics { $($(#[$meta])* pub $name: Counter,)* }

        impl Metrics {
            /// Names and values, in the table's order.
            #[must_use]
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$(($text, self.$name.get()),)*]
            }
        }
    };
}

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Raises the counter to `value` if it is lower: for maxima.
    pub fn raise_to(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// Batches of reads that were submitted to the device for file data.
    device_data_read_submissions = "device.data_read_submissions",
    /// Batches of reads that were submitted to the device for metadata.
    device_metadata_read_submissions = "device.metadata_read_submissions",
    device_bytes_read = "device.bytes_read",
    device_bytes_written = "device.bytes_written",
    device_flushes = "device.flushes",
    device_discards = "device.discards",
    journal_records = "journal.records",
    journal_record_bytes = "journal.record_bytes",
    journal_flushes = "journal.flushes",
    journal_reservations_blocked = "journal.reservations_blocked",
    transaction_commits = "transaction.commits",
    transaction_restarts = "transaction.restarts",
    /// Commits that found the leaf they need locked by another commit.
    transaction_leaf_contended = "transaction.leaf_contended",
    /// Commits that waited for a checkpoint to make room (dirty node bytes, journal).
    transaction_checkpoint_waits = "transaction.checkpoint_waits",
    /// The longest time that a commit waited for a lock that a checkpoint held, in microseconds.
    transaction_lock_wait_max_us = "transaction.lock_wait_max_us",
    /// The longest time that a commit waited for room: for a checkpoint to clean nodes or to free the journal, in microseconds.
    transaction_room_wait_max_us = "transaction.room_wait_max_us",
    btree_node_reads = "btree.node_reads",
    btree_node_read_repaired = "btree.node_read_repaired",
    btree_bset_appends = "btree.bset_appends",
    btree_node_rewrites = "btree.node_rewrites",
    btree_node_bytes_written = "btree.node_bytes_written",
    btree_splits = "btree.splits",
    btree_merges = "btree.merges",
    btree_evictions = "btree.evictions",
    checkpoints = "checkpoint.count",
    checkpoint_duration_max_us = "checkpoint.duration_max_us",
    /// Pieces of space that were asked for: for data, and buckets for nodes.
    space_allocations = "space.allocations",
    buckets_opened = "space.buckets_opened",
    buckets_emptied = "space.buckets_emptied",
    buckets_discarded = "space.buckets_discarded",
    copygc_buckets = "copygc.buckets",
    copygc_bytes = "copygc.bytes",
    /// How often these workers found no space for the keys that they change, and waited for some.
    copygc_space_waits = "copygc.space_waits",
    free_space_waits = "free.space_waits",
    deletion_space_waits = "deletion.space_waits",
    data_bytes_written = "data.bytes_written",
    data_bytes_compressed_in = "data.bytes_compressed_in",
    data_bytes_compressed_out = "data.bytes_compressed_out",
    /// The most compressed frames of one read that were decoded at the same time.
    data_frames_decoded_at_once = "data.frames_decoded_at_once_max",
    data_checksum_errors = "data.checksum_errors",
    pagecache_hits = "pagecache.hits",
    pagecache_misses = "pagecache.misses",
    pagecache_refaults = "pagecache.refaults",
    pagecache_add_taken = "pagecache.add_taken",
    pagecache_add_waited = "pagecache.add_waited",
    pagecache_block_taken = "pagecache.block_taken",
    pagecache_block_waited = "pagecache.block_waited",
    pagecache_readahead_batches = "pagecache.readahead_batches",
    pagecache_readahead_folios = "pagecache.readahead_folios",
    pagecache_readahead_used = "pagecache.readahead_used",
    /// Folios that readahead inserted and that were evicted before anybody read them.
    pagecache_readahead_wasted = "pagecache.readahead_wasted",
    pagecache_evicted_folios = "pagecache.evicted_folios",
    pagecache_splice_references = "pagecache.splice_references",
    /// Direct reads and writes of files of which nothing was cached.
    direct_fast = "pagecache.direct_fast",
    /// Direct reads and writes that had cached pages, or somebody who changed extents, to be coherent with.
    direct_slow = "pagecache.direct_slow",
    /// Writes that waited at the dirty limit.
    pagecache_writer_throttled = "pagecache.writer_throttled",
    /// Writes that paused before it: writers are slowed down to what the devices achieve.
    pagecache_writer_paused = "pagecache.writer_paused",
    /// How long both took, in microseconds, all writers together.
    pagecache_writer_throttled_us = "pagecache.writer_throttled_us",
    reply_bytes_copied = "pagecache.reply_bytes_copied",
    reply_bytes_referenced = "pagecache.reply_bytes_referenced",
    writeback_bytes = "writeback.bytes",
    writeback_extents = "writeback.extents",
    vfs_panics = "vfs.panics",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_shows_what_was_counted() {
        let metrics = Metrics::default();
        metrics.journal_records.add(2);
        metrics.journal_records.increment();
        assert!(metrics.snapshot().contains(&("journal.records", 3)));
    }
}
