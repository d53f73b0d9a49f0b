//! What people see of the agent: its log, and the tables that commands print. Nothing here decides anything.

pub mod changes;
pub mod health;
pub mod listen;
pub mod log;
pub mod report;
pub mod service_health;
pub mod table;
