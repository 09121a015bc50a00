//! Output files that are complete or absent.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tempfile::NamedTempFile;

/// A file under construction. It has a temporary name in the folder of `path`, where
/// [`finish`](Self::finish) moves it; dropped before, it is deleted.
pub struct Replacement {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
    _named: Named,
}

/// The temporary names of all files under construction.
static NAMES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn names() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Deletes all files under construction. For a handler of an interrupt that ends the process: their
/// owners are not dropped then.
pub fn delete_unfinished() {
    for name in names().drain(..) {
        // It may just have been moved or deleted.
        let _ = std::fs::remove_file(name);
    }
}

/// A temporary name, listed in [`NAMES`] until it is dropped.
struct Named(PathBuf);

impl Named {
    fn new(path: &Path) -> Self {
        names().push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        names().retain(|name| *name != self.0);
    }
}

impl Replacement {
    /// Creates the temporary file, with the permissions of an ordinary new file.
    ///
    /// # Errors
    /// A missing folder, or one that cannot be written; a `path` that is a folder, a device or a
    /// pipe, which a rename would remove.
    pub fn new(path: &Path) -> io::Result<Replacement> {
        let path = &behind_links(path)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".dfar-partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The umask restricts this, as for any new file.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let folder = folder_of(path);
        let file = builder.tempfile_in(folder).map_err(|error| {
            // The library's message has the random name.
            let reason = match error.kind() {
                io::ErrorKind::NotFound => format!("the folder {} does not exist", folder.display()),
                io::ErrorKind::PermissionDenied => {
                    format!("the folder {} does not permit new files", folder.display())
                }
                _ => return error,
            };
            io::Error::new(error.kind(), reason)
        })?;
        let named = Named::new(file.path());
        Ok(Replacement {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
            _named: named,
        })
    }

    /// Flushes the file to the disk and renames it.
    pub fn finish(self) -> io::Result<()> {
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        // The output is complete, even where a folder cannot be opened or synchronized.
        let _ = sync_folder_of(&self.path);
        Ok(())
    }
}

/// The regular or missing file that `path` names: a symbolic link stays, and the file behind it is
/// replaced.
fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let refuse = |kind, reason| Err(io::Error::new(kind, reason));
    match path.metadata() {
        Ok(found) if found.is_dir() => {
            refuse(io::ErrorKind::IsADirectory, "it is a folder; name a file in it")
        }
        Ok(found) if !found.is_file() => {
            refuse(io::ErrorKind::InvalidInput, "it is not a regular file, but a device or a pipe")
        }
        Ok(_) if path.is_symlink() => path.canonicalize(),
        // A link to a missing file. The target is relative to the folder of the link.
        Err(_) if path.is_symlink() => Ok(folder_of(path).join(path.read_link()?)),
        _ => Ok(path.to_owned()),
    }
}

impl Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The file of `read` that a replacement of `path` would replace, by whatever name it is given.
pub fn replaced<'a>(path: &Path, read: impl IntoIterator<Item = &'a Path>) -> Option<&'a Path> {
    let path = path.canonicalize().ok()?;
    read.into_iter().find(|read| read.canonicalize().is_ok_and(|read| read == path))
}

/// Forces the names in the folder of `path` to disk.
pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

/// The folder of a file.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) -> io::Result<()> {
        let mut file = Replacement::new(path)?;
        file.write_all(text.as_bytes())?;
        file.finish()
    }

    #[test]
    fn links_stay_and_their_files_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let [file, link, missing] = ["file", "link", "missing"].map(|name| folder.path().join(name));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        write(&link, "new").unwrap();
        assert!(link.is_symlink() && std::fs::read_to_string(&file).unwrap() == "new");
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("missing", &link).unwrap();
        write(&link, "made").unwrap();
        assert!(link.is_symlink() && std::fs::read_to_string(&missing).unwrap() == "made");
    }

    #[test]
    fn devices_pipes_and_folders_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [Path::new("/dev/null"), &pipe, folder.path()] {
            let kind = path.metadata().unwrap().file_type();
            let error = write(path, "text").unwrap_err();
            assert!(error.to_string().starts_with("it is "), "{error}");
            assert_eq!(path.metadata().unwrap().file_type(), kind);
        }
    }
}
