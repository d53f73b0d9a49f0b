//! What people and machines see of the agent: its log, its metrics, its health, its status, and the tables that commands
//! print. Nothing here decides anything.

pub mod changes;
pub mod counts;
pub mod events;
pub(crate) mod few;
pub mod health;
pub mod http;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod notices;
pub mod observed;
pub mod report;
mod runs;
pub mod service_health;
pub mod status;
pub mod table;

pub use self::observed::Observed;
