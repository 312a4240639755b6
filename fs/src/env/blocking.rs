//! A thread's word that it is about to wait: for an event, or for a device. Whoever runs the thread may want to put another in its place.
//!
//! Guarantees nothing about waits for locks: those are short, or their holder's own waits are told.

use std::cell::Cell;

thread_local! {
    static HOOK: Cell<Option<fn()>> = const { Cell::new(None) };
}

/// From now on `hook` runs on this thread before each wait. It may be called with locks held, and takes none that is ever held over a wait.
pub fn set_hook(hook: fn()) {
    HOOK.set(Some(hook));
}

/// The calling thread is about to wait.
#[inline]
pub fn about_to_wait() {
    if let Some(hook) = HOOK.get() {
        hook();
    }
}
