//! The imports between the modules of the library and its engine go one way, and docs/tour.md draws
//! them as they are. The structs of kernels are in the files that they name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The boxes of the drawing, top to bottom: (module path, name in the drawing). A module belongs to
/// the longest path that it begins with.
const BOXES: [(&str, &str); 23] = [
    ("error", "error"),
    ("train", "train"),
    ("evaluate", "evaluate"),
    ("model", "model"),
    ("batch", "batch"),
    ("data", "data"),
    ("auc", "auc"),
    ("replacement", "replacement"),
    ("threads", "threads"),
    ("device::cuda", "cuda"),
    ("device::cuda::device", "cuda/device"),
    ("device::cuda::ops", "cuda/ops"),
    ("device::cuda::gpu", "cuda/gpu"),
    ("device::cuda::capture", "cuda/capture"),
    ("device::cuda::array", "cuda/array"),
    ("device::cuda::driver", "cuda/driver"),
    ("device::cuda::runtime", "cuda/runtime"),
    ("device::cuda::plan", "cuda/plan"),
    ("device::cuda::error", "cuda/error"),
    ("device::cuda::kernel", "cuda/kernel"),
    ("device::cpu", "device/cpu"),
    ("device", "device"),
    ("attention", "attention"),
];

/// `a -> b`: a file of box `a` names a module of box `b`, with one such file.
type Arrows = BTreeMap<(usize, usize), PathBuf>;

#[test]
fn imports_go_one_way_and_the_tour_draws_them() {
    let arrows = arrows();
    let up: Vec<String> = arrows
        .iter()
        .filter(|((from, to), _)| from >= to)
        .map(|((from, to), file)| format!("{} imports {} ({})", BOXES[*from].1, BOXES[*to].1, file.display()))
        .collect();
    assert!(up.is_empty(), "imports that point up the list of boxes in {}:\n{}", file!(), up.join("\n"));

    let tour = Path::new("docs/tour.md");
    let text = std::fs::read_to_string(tour).unwrap();
    let (start, end) = ("```mermaid\n", "```\n");
    let start = text.find(start).expect("docs/tour.md has a drawing") + start.len();
    let length = text[start..].find(end).expect("the drawing ends");
    let drawing = drawing(&arrows);
    if std::env::var_os("DFAR_UPDATE").is_some() {
        let text = format!("{}{drawing}{}", &text[..start], &text[start + length..]);
        std::fs::write(tour, text).unwrap();
    } else {
        assert!(
            text[start..][..length] == drawing,
            "the imports changed; they are:\n{drawing}\nDFAR_UPDATE=1 cargo test --test imports draws them"
        );
    }
}

#[test]
fn structs_of_kernels_are_in_the_files_that_mirror_them() {
    let mut files = Vec::new();
    files_in(Path::new("kernels"), &["cu", "cuh"], &mut files);
    let mut found = 0;
    for kernel in &files {
        let text = std::fs::read_to_string(kernel).unwrap();
        for line in text.lines() {
            let Some((assertion, path)) = line.split_once("mirrored by ") else { continue };
            let path = &path[..path.find('"').unwrap_or(path.len())];
            let after = |start: &str| assertion.split_once(start).map(|(_, rest)| rest);
            let rest = after("sizeof(").or_else(|| after("offsetof(")).expect("an assertion on a struct");
            let name = rest.split([')', ',']).next().expect("a name");
            let mirror = std::fs::read_to_string(path).unwrap_or_default();
            assert!(
                mirror.contains(&format!("struct {name} ")),
                "{} says that {path} mirrors {name}",
                kernel.display()
            );
            found += 1;
        }
    }
    assert!(found > 30, "{found} structs");
}

#[test]
fn every_kind_of_path_is_resolved() {
    let text = "use crate::{data::{Dataset, Split}, model}; // crate::train\n\
                use super::super::plan as p;\n fn f(x: super::gpu::Gpu) { crate::auc::auc(x) }\n\
                pub use rows::Rows;\n\
                #[cfg(test)]\nmod tests { use crate::evaluate; }\n";
    let found = paths(text, &["device", "cuda", "ops"]);
    let expected = [
        "data::Dataset",
        "data::Split",
        "model",
        "device::plan",
        "device::cuda::gpu::Gpu",
        "auc::auc",
        "device::cuda::ops::rows::Rows",
    ];
    assert_eq!(found, expected.map(String::from).into());
}

/// The arrows of a Mermaid flowchart. An arrow is omitted where a longer way implies it.
fn drawing(arrows: &Arrows) -> String {
    let mut text = "flowchart TD\n".to_owned();
    for &(from, to) in arrows.keys() {
        let implied =
            (from + 1..to).any(|middle| arrows.contains_key(&(from, middle)) && reaches(arrows, middle, to));
        if !implied {
            text += &format!("    {} --> {}\n", BOXES[from].1, BOXES[to].1);
        }
    }
    text
}

/// Whether imports lead from one box to another.
fn reaches(arrows: &Arrows, from: usize, to: usize) -> bool {
    from == to || arrows.keys().any(|&(a, b)| a == from && b <= to && reaches(arrows, b, to))
}

fn arrows() -> Arrows {
    let mut arrows = Arrows::new();
    for root in ["src", "engine/src"] {
        let mut files = Vec::new();
        files_in(Path::new(root), &["rs"], &mut files);
        for file in files {
            let module = module(file.strip_prefix(root).unwrap());
            let module: Vec<&str> = module.iter().map(String::as_str).collect();
            let Some(from) = box_of(&module.join("::")) else { continue };
            let text = std::fs::read_to_string(&file).unwrap();
            for path in paths(&text, &module) {
                if let Some(to) = box_of(&path)
                    && from != to
                {
                    arrows.entry((from, to)).or_insert_with(|| file.clone());
                }
            }
        }
    }
    assert!(arrows.len() > 20, "too few imports found: {arrows:?}");
    arrows
}

/// All files with one of these extensions, sorted. Without the binaries.
fn files_in(folder: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() && path != Path::new("src/bin") {
            files_in(&path, extensions, files);
        } else if path.extension().is_some_and(|extension| extensions.iter().any(|one| extension == *one)) {
            files.push(path);
        }
    }
}

/// The path of the module in this file.
fn module(file: &Path) -> Vec<String> {
    let path = file.with_extension("");
    let mut parts: Vec<String> = path.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

/// The box of a module path; `None` for the root of a crate, and for modules without a box, which
/// import nothing.
fn box_of(path: &str) -> Option<usize> {
    let within = |outer: &str| path == outer || path.starts_with(&format!("{outer}::"));
    let outer = BOXES.iter().enumerate().filter(|(_, (outer, _))| within(outer));
    outer.max_by_key(|(_, (outer, _))| outer.len()).map(|(index, _)| index)
}

/// The modules and items that a source file names by `crate::` and `super::`, or re-exports from a
/// module below it; without its comments and tests.
fn paths(text: &str, module: &[&str]) -> BTreeSet<String> {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let text: String = text.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect();
    let mut found = BTreeSet::new();
    for (at, start) in text.match_indices("\npub use ") {
        tree(&text[at + start.len()..], &module.join("::"), &mut found);
    }
    let mut rest = text.as_str();
    while let Some(start) = rest.find("crate::").into_iter().chain(rest.find("super::")).min() {
        let part_of_a_name = rest[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let mut base: Vec<&str> =
            if rest[start..].starts_with("crate") { Vec::new() } else { module.to_vec() };
        rest = &rest[start..];
        if let Some(inside) = rest.strip_prefix("crate::") {
            rest = inside;
        }
        while let Some(above) = rest.strip_prefix("super::") {
            base.pop();
            rest = above;
        }
        if !part_of_a_name {
            rest = tree(rest, &base.join("::"), &mut found);
        }
    }
    found
}

/// Reads a path or a braced group of paths below `base`; returns the text behind it.
fn tree<'a>(text: &'a str, base: &str, found: &mut BTreeSet<String>) -> &'a str {
    let below = |name: &str| if base.is_empty() { name.to_owned() } else { format!("{base}::{name}") };
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            rest = tree(rest, base, found);
            let next = rest.find([',', '}']).expect("a group of imports is closed");
            rest = rest[next..].strip_prefix(',').unwrap_or(&rest[next..]);
        }
    }
    let length = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(length);
    match rest.strip_prefix("::") {
        Some(inside) if inside.starts_with(|c: char| c.is_alphabetic() || c == '{') => {
            tree(inside, &below(name), found)
        }
        _ => {
            if name != "self" && !name.is_empty() {
                found.insert(below(name));
            } else if !base.is_empty() {
                found.insert(base.to_owned());
            }
            rest
        }
    }
}
