//! Embeds `kernels/`: every `.cu` with all headers it includes, directly or not, and a hash of
//! their text. Needs no CUDA: the kernels are compiled at run time, for the GPU in use.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    let folder =
        PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("kernels");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let mut names = vec![];
    find_sources(&folder, "", &mut names);
    names.sort();

    let mut code = String::from("/// Every `.cu` of `kernels/`.\npub const SOURCES: &[Source] = &[\n");
    for name in names {
        let mut files = BTreeMap::new();
        close_over_includes(&folder, &name, &mut files);
        let hash = files.iter().fold(FNV_OFFSET, |hash, (name, text)| {
            fnv1a(fnv1a(fnv1a(hash, name.as_bytes()), &[0]), text.as_bytes())
        });
        // Not the folder's own path: it would be wrong after a move of the checkout, which does not
        // run this script again.
        let text = |name: &str| {
            format!("include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {:?}))", format!("/kernels/{name}"))
        };
        writeln!(
            code,
            "    Source {{ name: {name:?}, hash: {hash:#018x}, text: {}, headers: &[",
            text(&name)
        )
        .expect("strings can be written");
        for header in files.keys().filter(|header| **header != name) {
            writeln!(code, "        ({header:?}, {}),", text(header)).expect("strings can be written");
        }
        code.push_str("    ] },\n");
    }
    code.push_str("];\n");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("kernels.rs");
    std::fs::write(out, code).expect("OUT_DIR should be writable");
}

/// Adds the paths of all `.cu` below `folder` to `names`, relative to `kernels/` and with `/`
/// between folders.
fn find_sources(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("kernels/ should be there") {
        let entry = entry.expect("kernels/ should be readable");
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            find_sources(&entry.path(), &format!("{name}/"), names);
        } else if name.ends_with(".cu") {
            names.push(name);
        }
    }
}

/// Reads `name` and all files it includes by `#include "..."`. A missing header belongs to another
/// compiler (the emulator's, behind an `#ifdef`) and is skipped.
fn close_over_includes(folder: &Path, name: &str, files: &mut BTreeMap<String, String>) {
    if files.contains_key(name) {
        return;
    }
    let Ok(text) = std::fs::read_to_string(folder.join(name)) else { return };
    files.insert(name.to_owned(), text.clone());
    for line in text.lines() {
        if let Some(header) = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'))
        {
            close_over_includes(folder, header, files);
        }
    }
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
