//! Lengths that an Arrow IPC file claims: those of its messages, and those of compressed buffers when
//! they are unpacked. The decoder allocates that much before it reads (arrow 60). A damaged file
//! could thereby abort the program, so these lengths are checked first. The decoder itself reports
//! all other damage.

use crate::memory::fallible;
use arrow_ipc::{CompressionType, Message, root_as_footer, root_as_message};
use std::io::{self, Read, Seek, SeekFrom};

/// Length of the prefix with the unpacked length (i64) in a compressed buffer.
const PREFIX: i64 = 8;
/// Before the length of a message; absent in files older than Arrow 0.15.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// No claims to check, or none that can be read: the decoder decides.
const PASS: Result<(), String> = Ok(());

/// Checks the buffers of an Arrow IPC file, whose footer lists its messages. The position of `file`
/// afterwards is arbitrary.
pub(super) fn check_file(file: &mut (impl Read + Seek)) -> Result<(), String> {
    let footer = (|| {
        let mut end = [0; 10];
        file.seek(SeekFrom::End(-10))?;
        file.read_exact(&mut end)?;
        let length = arrow_ipc::reader::read_footer_length(end).map_err(io::Error::other)?;
        let start = file.seek(SeekFrom::End(-10 - length as i64))?;
        read_at(file, start, length as u64)
    })();
    let Ok(footer) = footer else { return PASS };
    let Ok(footer) = root_as_footer(&footer) else { return PASS };
    for block in footer.dictionaries().iter().chain(&footer.recordBatches()).flatten() {
        let (start, length) = (block.offset(), i64::from(block.metaDataLength()));
        let [start, length, _] = within(file, [start, length, block.bodyLength()])?;
        let Ok(metadata) = read_at(file, start, length) else { return PASS };
        let prefix = if metadata.starts_with(&CONTINUATION) { 8 } else { 4 };
        check_message(file, start + length, parse(metadata.get(prefix..).unwrap_or(&[]), start)?)?;
    }
    PASS
}

/// Checks the buffers of an Arrow IPC stream, message by message.
pub(super) fn check_stream(file: &mut (impl Read + Seek)) -> Result<(), String> {
    let mut start = 0;
    loop {
        let Ok(prefix) = read_at(file, start, 8) else { return PASS };
        let (length, prefix) = match prefix.strip_prefix(&CONTINUATION) {
            Some(length) => (length, 8),
            None => (&prefix[..4], 4),
        };
        let length = i32::from_le_bytes(length.try_into().expect("4 bytes")).into();
        if length == 0 {
            return PASS; // the end of the stream
        }
        let [at, length, _] = within(file, [start as i64 + prefix, length, 0])?;
        let Ok(metadata) = read_at(file, at, length) else { return PASS };
        let message = parse(&metadata, start)?;
        let body = at + length;
        let [_, _, length] = within(file, [body as i64, 0, message.bodyLength()])?;
        check_message(file, body, message)?;
        start = body + length;
    }
}

/// The start of a message, the length of its metadata and that of its body; an error if they reach
/// beyond the file.
fn within(file: &mut impl Seek, message: [i64; 3]) -> Result<[u64; 3], String> {
    let end = file.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
    let sum = message.iter().try_fold(0i64, |sum, &x| if x < 0 { None } else { sum.checked_add(x) });
    match sum.and_then(|sum| u64::try_from(sum).ok()) {
        Some(sum) if sum <= end => Ok(message.map(|x| x as u64)),
        _ => Err(format!("its message at byte {} reaches beyond the end of the file", message[0])),
    }
}

/// The message of these bytes, which begins at `start`. The decoder would also take one whose
/// tables reach beyond them into the body, where they cannot be checked.
fn parse(metadata: &[u8], start: u64) -> Result<Message<'_>, String> {
    root_as_message(metadata).map_err(|error| format!("its message at byte {start} is damaged: {error}"))
}

/// Checks the buffers of the message whose body begins at `body`.
fn check_message(file: &mut (impl Read + Seek), body: u64, message: Message) -> Result<(), String> {
    let dictionary = || message.header_as_dictionary_batch()?.data();
    let Some(batch) = message.header_as_record_batch().or_else(dictionary) else { return PASS };
    let Some(compression) = batch.compression() else { return PASS };
    let Ok(end) = file.seek(SeekFrom::End(0)) else { return PASS };
    for buffer in batch.buffers().iter().flatten().filter(|buffer| buffer.length() > PREFIX) {
        let Some(start) = body.checked_add_signed(buffer.offset()) else { continue };
        let Ok(prefix) = read_at(file, start, PREFIX as u64) else { continue };
        let claimed = i64::from_le_bytes(prefix.try_into().expect("8 bytes"));
        if start.saturating_add_signed(buffer.length()) > end {
            continue; // the decoder reports a file that is cut
        }
        let stored = buffer.length() - PREFIX;
        // A byte of LZ4 stands for at most 255; a block of zstd has at least 3 bytes and at most
        // 128 KiB unpacked.
        let most = match compression.codec() {
            CompressionType::LZ4_FRAME => stored.saturating_mul(255),
            _ => (stored / 3 + 1).saturating_mul(128 << 10),
        };
        let problem = if claimed > most {
            "which is impossible"
        } else if !fits_memory(claimed) {
            "which is more memory than there is"
        } else {
            continue;
        };
        return Err(format!(
            "its buffer of {stored} compressed bytes claims to unpack to {claimed} bytes, {problem}"
        ));
    }
    PASS
}

/// Whether the system gives this many bytes.
fn fits_memory(bytes: i64) -> bool {
    let mut memory = Vec::<u8>::new();
    let bytes = usize::try_from(bytes).unwrap_or(0);
    let given = fallible(|| memory.try_reserve_exact(bytes)).is_ok();
    // Memory that nothing uses would not be allocated at all.
    std::hint::black_box(memory.as_ptr());
    given
}

/// Reads these bytes. An end of the file before them is an error, and costs no memory.
fn read_at(file: &mut (impl Read + Seek), start: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{Int64Array, RecordBatch};
    use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
    use std::io::Cursor;
    use std::sync::Arc;

    const ROWS: usize = 1000;

    fn written(codec: CompressionType, stream: bool) -> Vec<u8> {
        let column = Int64Array::from_iter_values((0..ROWS as i64).map(|row| row % 7));
        let batch = RecordBatch::try_from_iter([("user", Arc::new(column) as _)]).unwrap();
        let options = IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
        let mut bytes = Vec::new();
        if stream {
            let mut writer =
                StreamWriter::try_new_with_options(&mut bytes, &batch.schema(), options).unwrap();
            writer.write(&batch).and_then(|()| writer.write(&batch)).and_then(|()| writer.finish()).unwrap();
        } else {
            let mut writer = FileWriter::try_new_with_options(&mut bytes, &batch.schema(), options).unwrap();
            writer.write(&batch).and_then(|()| writer.write(&batch)).and_then(|()| writer.finish()).unwrap();
        }
        bytes
    }

    #[test]
    fn tables_that_reach_into_the_body_are_refused() {
        let sound = written(CompressionType::LZ4_FRAME, false);
        let start = sound.windows(4).position(|bytes| bytes == CONTINUATION).unwrap();
        let message = (start + 4..sound.len()).find(|&at| sound[at..].starts_with(&CONTINUATION)).unwrap();
        let mut damaged = sound.clone();
        // The first table of the message of a batch lies far behind the metadata.
        damaged[message + 8..message + 12].copy_from_slice(&i32::MAX.to_le_bytes());
        let error = check_file(&mut Cursor::new(&damaged)).expect_err("it is damaged");
        assert!(error.contains(&format!("message at byte {message} is damaged")), "{error}");
    }

    #[test]
    fn memory_beyond_the_machine_does_not_fit() {
        assert!(fits_memory(0) && fits_memory(1 << 20) && fits_memory(-1));
        assert!(!fits_memory(1 << 50) && !fits_memory(i64::MAX));
    }

    #[test]
    fn impossible_unpacked_lengths_are_refused() {
        for codec in [CompressionType::LZ4_FRAME, CompressionType::ZSTD] {
            for stream in [false, true] {
                let check = |bytes: &[u8]| match stream {
                    true => check_stream(&mut Cursor::new(bytes)),
                    false => check_file(&mut Cursor::new(bytes)),
                };
                let sound = written(codec, stream);
                assert_eq!(check(&sound), PASS);
                let claim = (8 * ROWS as i64).to_le_bytes();
                let places: Vec<usize> =
                    (0..sound.len() - 8).filter(|&at| sound[at..at + 8] == claim).collect();
                assert!(places.len() >= 2, "one for each batch");
                for place in [places[0], places[places.len() - 1]] {
                    for claimed in [i64::MAX, 1 << 50] {
                        let mut damaged = sound.clone();
                        damaged[place..place + 8].copy_from_slice(&claimed.to_le_bytes());
                        let error = check(&damaged).expect_err("the claim is false");
                        assert!(error.contains(&format!("unpack to {claimed} bytes")), "{error}");
                    }
                }
                for length in 0..sound.len() {
                    // Else, the decoder reports a file that is cut.
                    if let Err(error) = check(&sound[..length]) {
                        assert!(error.contains("reaches beyond the end"), "{error}");
                    }
                }
            }
        }
    }
}
