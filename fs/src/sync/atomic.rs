//! Atomics of test builds: the standard library's, at each operation of which an explored task may be preempted ([`super::schedule`]).

use super::schedule::point;
pub use std::sync::atomic::{Ordering, fence};

macro_rules! atomics {
    ($($name:ident: $value:ty { $($operation:ident),* })*) => { $(
        #[doc = concat!("As [`std::sync::atomic::", stringify!($name), "`].")]
        #[derive(Debug, Default)]
        pub struct $name(std::sync::atomic::$name);

        #[allow(dead_code, missing_docs, reason = "as the standard library's, whoever uses it")]
        impl $name {
            pub const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub fn into_inner(self) -> $value {
                self.0.into_inner()
            }

            pub fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            pub fn load(&self, order: Ordering) -> $value {
                point();
                self.0.load(order)
            }

            pub fn store(&self, value: $value, order: Ordering) {
                point();
                self.0.store(value, order);
            }

            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange(current, new, success, failure)
            }

            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange_weak(current, new, success, failure)
            }

            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                change: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                point();
                self.0.fetch_update(set, fetch, change)
            }

            $(pub fn $operation(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.$operation(value, order)
            })*
        }
    )* };
}

atomics! {
    AtomicBool: bool { swap, fetch_and, fetch_or }
    AtomicU8: u8 { swap, fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max, fetch_min }
    AtomicU32: u32 { swap, fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max, fetch_min }
    AtomicU64: u64 { swap, fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max, fetch_min }
    AtomicUsize: usize { swap, fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max, fetch_min }
    AtomicI64: i64 { swap, fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max, fetch_min }
}
