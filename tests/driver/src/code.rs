//! Result codes of the driver (cuda.h, `CUresult`), and the error of a call.

/// `CUresult`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub i32);

macro_rules! codes {
    ($($name:ident $value:literal $text:literal;)+) => {
        impl Code {
            $(pub const $name: Code = Code($value);)+
        }
        /// Texts of `cuGetErrorString`.
        pub const TEXTS: &[(i32, &str)] = &[$(($value, concat!($text, "\0"))),+];
    };
}

codes! {
    SUCCESS 0 "no error";
    INVALID_VALUE 1 "invalid argument";
    OUT_OF_MEMORY 2 "out of memory";
    NOT_INITIALIZED 3 "initialization error";
    INVALID_DEVICE 101 "invalid device ordinal";
    INVALID_IMAGE 200 "device kernel image is invalid";
    INVALID_CONTEXT 201 "invalid device context";
    NO_BINARY_FOR_GPU 209 "no kernel image is available for execution on the device";
    INVALID_HANDLE 400 "invalid resource handle";
    ILLEGAL_STATE 401 "the operation cannot be performed in the present state";
    NOT_FOUND 500 "named symbol not found";
    NOT_READY 600 "device not ready";
    ILLEGAL_ADDRESS 700 "an illegal memory access was encountered";
    LAUNCH_FAILED 719 "unspecified launch failure";
    NOT_SUPPORTED 801 "operation not supported";
    CAPTURE_UNSUPPORTED 900 "operation not permitted when stream is capturing";
    CAPTURE_INVALIDATED 901 "operation failed due to a previous error during capture";
    CAPTURE_ISOLATION 905 "dependency created on uncaptured work in another stream";
    CAPTURE_IMPLICIT 906 "operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT 907 "operation not permitted on an event last recorded in a capturing stream";
    UPDATE_FAILURE 910 "the graph update was not performed because it included changes which violated constraints";
}

/// Why a call fails.
#[derive(Clone, Debug)]
pub enum Failure {
    /// An answer that a caller may get from a real driver without doing wrong.
    Answer(Code),
    /// Misuse: reported on stderr, and the end of the process unless `DFAR_DRIVER_FAULTS=return`.
    Fault(Code, String),
}

pub type Done<T = ()> = Result<T, Failure>;

/// A misuse.
pub fn fault<T>(code: Code, message: impl Into<String>) -> Done<T> {
    Err(Failure::Fault(code, message.into()))
}

/// An error of a handle.
pub fn handle(message: String) -> Failure {
    Failure::Fault(Code::INVALID_HANDLE, message)
}
