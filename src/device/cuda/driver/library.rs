//! Where NVIDIA's libraries are, and which version fits the driver.
//!
//! NVRTC and cuBLASLt of a major version above the driver's do not work with it: the driver does
//! not load the code, or the library fails to open. Their versions are tried latest first, from the
//! one that the driver supports; first on the loader's path, then where pip and the CUDA toolkit
//! put them.

use std::path::{Path, PathBuf};

/// Major versions of CUDA that the library works with, latest first.
const MAJORS: [i32; 2] = [13, 12];

/// File names to try for a library, latest version first. `name` gives that of a major version;
/// without a version, the name that a toolkit links. `driver`: the driver's version, e.g. 12090;
/// `None` for no limit.
pub(crate) fn names(name: impl Fn(Option<i32>) -> String, driver: Option<i32>) -> Vec<String> {
    let fits = |major: &i32| driver.is_none_or(|driver| *major <= driver / 1000);
    MAJORS.into_iter().filter(fits).map(Some).chain([None]).map(name).collect()
}

/// Paths to try for a library of these [`names`], best first.
pub(crate) fn candidates(names: &[String]) -> Vec<PathBuf> {
    candidates_in(names, &folders())
}

fn candidates_in(names: &[String], folders: &[PathBuf]) -> Vec<PathBuf> {
    let (unversioned, versioned) = names.split_last().expect("one name has no version");
    let on_path = versioned.iter().map(PathBuf::from);
    let in_folders = versioned.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    on_path.chain(in_folders).chain([unversioned.into()]).collect()
}

/// Folders of pip's packages, those of the active Python first, and of the CUDA toolkit.
fn folders() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let python = variable("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|folder| folder.join("python3")).find(|python| python.exists())
    });
    let mut folders: Vec<PathBuf> = vec![];
    let active = [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX")].into_iter().flatten();
    let of_python = python.iter().flat_map(|python| prefixes(python));
    // `pip install --user`, and pip of Debian as root.
    let shared = [variable("HOME").map(|home| home.join(".local")), Some("/usr/local".into())];
    for prefix in active.chain(of_python).chain(shared.into_iter().flatten()) {
        folders.extend(pip_folders(&prefix));
        folders.push(prefix.join("lib")); // of a conda environment
    }
    let toolkits = [variable("CUDA_HOME"), variable("CUDA_PATH"), Some("/usr/local/cuda".into())];
    folders.extend(toolkits.into_iter().flatten().map(|toolkit| toolkit.join("lib64")));
    folders
}

/// Prefixes of a Python program: that of its own path, which in a virtual environment is a link to
/// the program of another prefix, and those of the links' targets, because the path itself may be a
/// link into an environment.
fn prefixes(python: &Path) -> impl Iterator<Item = PathBuf> {
    let target = |program: &PathBuf| Some(program.parent()?.join(program.read_link().ok()?));
    // Linux follows 40 links.
    std::iter::successors(Some(python.to_owned()), target)
        .take(40)
        .filter_map(|program| Some(program.parent()?.parent()?.to_owned()))
}

/// `lib/python3*/site-packages/nvidia/*/lib` (and of `dist-packages`) below a prefix, in the order of
/// their names.
fn pip_folders(prefix: &Path) -> Vec<PathBuf> {
    let below = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let pythons = below(&prefix.join("lib"))
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    pythons
        .flat_map(|python| {
            ["site-packages", "dist-packages"].map(|packages| python.join(packages).join("nvidia"))
        })
        .flat_map(|nvidia| below(&nvidia))
        .map(|package| package.join("lib"))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Whether the process has opened only the `stubs/libcuda.so` that a toolkit has for linking: all
/// its functions fail. Linux names the files that a process has mapped.
pub(crate) fn driver_is_a_stub() -> bool {
    only_stubs(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
}

/// Whether every mapped libcuda is one for linking, and there is one.
fn only_stubs(maps: &str) -> bool {
    let mut libraries = maps.lines().filter_map(|line| {
        let path = line.split_whitespace().nth(5)?;
        Path::new(path).file_name()?.to_str()?.starts_with("libcuda.so").then_some(path)
    });
    let stub = |path: &str| path.contains("/stubs/");
    libraries.next().is_some_and(|first| stub(first) && libraries.all(stub))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(major: Option<i32>) -> String {
        major.map_or("libx.so".to_owned(), |major| format!("libx.so.{major}"))
    }

    #[test]
    fn a_library_of_a_later_major_version_than_the_drivers_is_not_tried() {
        let of = |driver| candidates_in(&names(name, driver), &["/a".into()]);
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(of(Some(12_040)), paths(&["libx.so.12", "/a/libx.so.12", "libx.so"]));
        let all = ["libx.so.13", "libx.so.12", "/a/libx.so.13", "/a/libx.so.12", "libx.so"];
        assert_eq!(of(Some(13_010)), paths(&all));
        assert_eq!(of(None), paths(&all));
    }

    #[test]
    fn pips_packages_are_found_below_a_prefix() {
        let prefix = tempfile::tempdir().expect("a folder");
        let lib = prefix.path().join("lib");
        let site = lib.join("python3.11/site-packages/nvidia");
        let dist = lib.join("python3/dist-packages/nvidia");
        for package in ["cublas/lib", "cuda_nvrtc/lib", "cublas_headers/include"] {
            std::fs::create_dir_all(site.join(package)).expect("writable");
        }
        std::fs::create_dir_all(dist.join("cu13/lib")).expect("writable");
        assert_eq!(
            pip_folders(prefix.path()),
            [dist.join("cu13/lib"), site.join("cublas/lib"), site.join("cuda_nvrtc/lib")]
        );
        assert_eq!(pip_folders(Path::new("/nowhere")), Vec::<PathBuf>::new());
    }

    #[cfg(unix)]
    #[test]
    fn the_prefix_of_a_linked_python_is_found() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().expect("a folder");
        let folder = |name: &str| {
            let bin = root.path().join(name).join("bin");
            std::fs::create_dir_all(&bin).expect("writable");
            bin
        };
        let (system, environment, local) = (folder("usr"), folder("venv"), folder("local"));
        std::fs::write(system.join("python3"), "").expect("writable");
        symlink(system.join("python3"), environment.join("python3")).expect("writable");
        // A relative link too.
        symlink("../../venv/bin/python3", local.join("python3")).expect("writable");
        let found: Vec<_> =
            prefixes(&local.join("python3")).map(|p| p.canonicalize().expect("exists")).collect();
        let expected =
            ["local", "venv", "usr"].map(|name| root.path().join(name).canonicalize().expect("exists"));
        assert_eq!(found, expected);
        // A link to itself ends.
        symlink("loop", system.join("loop")).expect("writable");
        assert_eq!(prefixes(&system.join("loop")).count(), 40);
    }

    #[test]
    fn the_library_for_linking_is_not_the_driver() {
        let line = |path: &str| format!("7f00-7f01 r-xp 00000000 08:01 123 {path}\n");
        let stub = line("/usr/local/cuda/targets/x86_64-linux/lib/stubs/libcuda.so");
        let real = line("/usr/lib/x86_64-linux-gnu/libcuda.so.550.54");
        assert!(only_stubs(&(line("/usr/lib/libc.so.6") + &stub)));
        assert!(
            !only_stubs(&(stub.clone() + &real))
                && !only_stubs(&real)
                && !only_stubs(&line("/lib/libcudart.so.12"))
        );
    }
}
