//! Compiles the kernels as C++, with a check of every memory access. A module is a `.cu` file with
//! its macros; each module becomes a source of its own, named as in the library.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=../../kernels");
    let base = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).include("src").include("../../kernels");
        // -ffp-contract=off: the compiler must not fuse the kernels' separate multiplications and
        // additions.
        build
            .flag("-ffp-contract=off")
            .flag("-fno-exceptions")
            .flag("-fno-rtti")
            .define("DFAR_EMULATOR", None)
            .warnings(true);
        build
    };
    // With -fsanitize=thread the compiler inserts a call before each memory access. runtime.cpp
    // defines the called functions; the race detector of the sanitizer is not linked.
    let mut kernels = base();
    kernels.flag("-fsanitize=thread");
    for flag in ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"] {
        kernels.flag(flag);
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    // Not in OUT_DIR, which differs between clippy, documentation and tests.
    let kept = out.ancestors().nth(3).expect("it is deep in target/").join("emulated-modules");
    std::fs::create_dir_all(&kept).expect("target/ should be writable");
    let compiler = kernels.get_compiler();
    let compiler = format!("{:?} {:?}", compiler.path(), compiler.args());
    let mut library = base();
    let (mut missing, mut objects) = (vec![], vec![]);
    for (source, defines) in modules() {
        let (text, hash) = module_text(source, &defines, &compiler);
        let stem = format!("{}_{hash:016x}", source.trim_end_matches(".cu").replace('/', "_"));
        let object = kept.join(format!("{stem}.o"));
        // Reuses objects of earlier builds: compiling all of them takes minutes.
        if !object.exists() {
            let path = out.join(format!("{stem}.cpp"));
            std::fs::write(&path, text).expect("OUT_DIR should be writable");
            kernels.file(path);
            missing.push(object.clone());
        }
        objects.push(object);
    }
    if !missing.is_empty() {
        for (made, object) in kernels.compile_intermediates().into_iter().zip(missing) {
            std::fs::rename(made, object).expect("target/ should be writable");
        }
    }
    let mut own = base();
    own.flag("-fsanitize=thread")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-parameter")
        .files(["src/faults.cpp", "src/functions.cpp"]);
    objects.extend(own.compile_intermediates());
    library.objects(objects);
    // Whole archive: nothing refers to the kernels; their constructors register them.
    library.link_lib_modifier("+whole-archive").compile("dfar_emulator_kernels");
    base().file("src/runtime.cpp").compile("dfar_emulator_runtime");
}

/// With the feature `sweep`, all modules whose kernels the library launches. Without it, those
/// modules with the head widths of `head_dims` in lib.rs: the others differ in constants only.
fn modules() -> Vec<(&'static str, Vec<(&'static str, String)>)> {
    let sweep = std::env::var_os("CARGO_FEATURE_SWEEP").is_some();
    let mut modules = vec![];
    for (element, head_dims) in [("float", &[8, 16][..]), ("bf16", &[16]), ("f16", &[])] {
        for head_dim in if sweep { &[8, 16, 32, 64, 128] } else { head_dims } {
            let defines = vec![("DFAR_ELEMENT", element.to_owned()), ("DFAR_HEAD_DIM", head_dim.to_string())];
            modules.push(("attention/attention.cu", defines));
        }
    }
    // The variant with polynomials instead of some exponentials, for a test.
    for element in if sweep { &["bf16", "f16"][..] } else { &[] } {
        let defines = [("DFAR_ELEMENT", *element), ("DFAR_HEAD_DIM", "16"), ("DFAR_POLYNOMIAL", "3")];
        modules
            .push(("attention/attention.cu", defines.map(|(name, value)| (name, value.to_owned())).to_vec()));
    }
    for element in ["float", "bf16"] {
        modules.push(("attention/convert.cu", vec![("DFAR_ELEMENT", element.to_owned())]));
        for [width, hidden0, hidden1] in [[16, 16, 8], [16, 80, 40], [32, 80, 40], [64, 48, 24]] {
            let sizes = [("DFAR_WIDTH", width), ("DFAR_HIDDEN0", hidden0), ("DFAR_HIDDEN1", hidden1)];
            let mut defines = vec![("DFAR_ELEMENT", element.to_owned())];
            defines.extend(sizes.map(|(name, size): (_, u32)| (name, size.to_string())));
            modules.push(("target/target_attention.cu", defines));
        }
    }
    for source in [
        "step/embedding.cu",
        "step/layer_norm.cu",
        "step/limits.cu",
        "step/loss.cu",
        "attention/naive_attention.cu",
        "step/optimizer.cu",
        "step/prefix_mean.cu",
        "step/products.cu",
        "step/rows.cu",
    ] {
        modules.push((source, vec![]));
    }
    modules
}

/// The C++ source of a module and a hash of all its inputs. Each module has its own namespace,
/// because modules define the same names differently.
fn module_text(source: &str, defines: &[(&str, String)], compiler: &str) -> (String, u64) {
    let mut name = source.to_owned();
    let mut text = String::new();
    for (define, value) in defines {
        name += &format!(" {define}={value}");
        text += &format!("#define {define} {value}\n");
    }
    text += &format!("#define DFAR_MODULE \"{name}\"\n#include \"primitives.cuh\"\n");
    text += &format!("namespace {{\n#include \"{source}\"\n}}\n");
    let mut files = BTreeSet::new();
    close_over_includes("emulator.h", &mut files);
    close_over_includes(source, &mut files);
    let mut hasher = DefaultHasher::new();
    (&text, include_str!("build.rs"), compiler).hash(&mut hasher);
    for file in files {
        std::fs::read(path_of(&file)).expect("it was found").hash(&mut hasher);
    }
    (text, hasher.finish())
}

fn path_of(name: &str) -> PathBuf {
    let kernels = Path::new("../../kernels").join(name);
    if kernels.exists() { kernels } else { Path::new("src").join(name) }
}

fn close_over_includes(name: &str, files: &mut BTreeSet<String>) {
    let Ok(text) = std::fs::read_to_string(path_of(name)) else { return };
    if !files.insert(name.to_owned()) {
        return;
    }
    for line in text.lines() {
        let header = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        header.into_iter().for_each(|header| close_over_includes(header, files));
    }
}
