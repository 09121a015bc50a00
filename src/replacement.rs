//! Output files that are complete or absent.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file under construction. It has a temporary name in the folder of `path`, where
/// [`finish`](Self::finish) moves it; dropped before, it is deleted.
pub struct Replacement {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl Replacement {
    /// Creates the temporary file, with the permissions of an ordinary new file.
    pub fn new(path: &Path) -> io::Result<Replacement> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".dfar-partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The umask restricts this, as for any new file.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let folder = folder_of(path);
        let file = builder.tempfile_in(folder).map_err(|error| match error.kind() {
            // The library's message has the random name.
            io::ErrorKind::NotFound => {
                io::Error::new(error.kind(), format!("the folder {} does not exist", folder.display()))
            }
            _ => error,
        })?;
        Ok(Replacement { file: BufWriter::with_capacity(1 << 20, file), path: path.to_owned() })
    }

    /// Flushes the file to the disk and renames it.
    pub fn finish(self) -> io::Result<()> {
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        Ok(())
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

/// The folder of a file.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
