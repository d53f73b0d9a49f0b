//! The agent: watches Services, works out what this node should have, and keeps the kernel's tables like that.
//!
//! Data flows one way, and modules know only those before them:
//! `source -> catalog -> desired -> delta -> sink`.
//! Everything from `model` to `delta` is pure: no I/O, no clock, tested without root.

mod allocator;
pub mod app;
pub mod catalog;
pub mod cli;
pub mod delta;
pub mod desired;
pub mod model;
pub mod observe;
pub mod sink;
pub mod source;
