//! What a localv1 server says, as far as it is a message at all: whatever it is, the agent's objects are those of the values that it has
//! said. The modules are the agent's own: all of the agent would take minutes to build.
#![no_main]
#![allow(dead_code, unused_imports, missing_docs, reason = "the agent uses the rest")]

#[path = "../../../proxier/src/source/api/import/mod.rs"]
mod import;
#[path = "../../../proxier/src/model/mod.rs"]
mod model;

libfuzzer_sys::fuzz_target!(|data: &[u8]| import::reference::judge(data));
