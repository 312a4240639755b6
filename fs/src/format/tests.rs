//! Golden bytes and totality of every decoder.
