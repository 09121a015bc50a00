// Runs blocks of fibres and checks every memory access. Not thread-safe: one OS thread uses a
// device at a time.
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sys/mman.h>
#include <vector>
// Element types, which emulator.h needs.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
#include "emulator.h"

// ---------------------------------------------------------------- switching stacks
#if defined(__x86_64__)
extern "C" void dfar_fibre_switch(void** save, void* to);
asm(R"(
.text
.globl dfar_fibre_switch
dfar_fibre_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Context { void* at = nullptr; };
static void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
    // The ABI requires a stack pointer of 8 modulo 16 at the first instruction of a function.
    void** top = reinterpret_cast<void**>(stack + bytes) - 3;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.at = top;
}
static void change(Context& from, Context& to) { dfar_fibre_switch(&from.at, to.at); }
#else
#include <ucontext.h>
struct Context { ucontext_t at; };
static void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.at);
    context.at.uc_stack.ss_sp = stack;
    context.at.uc_stack.ss_size = bytes;
    context.at.uc_link = nullptr;
    makecontext(&context.at, entry, 0);
}
static void change(Context& from, Context& to) { swapcontext(&from.at, &to.at); }
#endif

namespace emulator {

constinit thread_local Thread* self = nullptr;

static constinit const Entry* entries = nullptr;
Entry::Entry(const char* module, const char* name, void (*run)(const void*), size_t params_bytes, Bounds bounds)
    : module(module), name(name), run(run), params_bytes(params_bytes), bounds(bounds), next(entries) {
    entries = this;
}

// ---------------------------------------------------------------- memory
// State of one byte of device memory.
enum State : unsigned char { NONE, UNWRITTEN, WRITTEN, READ_ONLY };

// The last write or read of a byte of shared memory: its thread, and its time in barriers. Only the
// last of several readers is kept, so a race with an earlier reader may go undetected. One word,
// because nearly every access compares and writes several.
struct Touch {
    uint64_t block_time : 32 = 0, warp_time : 21 = 0, next_thread : 11 = 0;  // 0: no thread
    int thread() const { return int(next_thread) - 1; }
    bool operator==(const Touch& other) const { return std::bit_cast<uint64_t>(*this) == std::bit_cast<uint64_t>(other); }
};
static_assert(sizeof(Touch) == 8);

#ifndef DFAR_EMULATOR_ARENA
#define DFAR_EMULATOR_ARENA (size_t(1) << 30)
#endif
constexpr size_t ARENA = DFAR_EMULATOR_ARENA, PAGE = 256, GAP = 4096, STACK = 256 << 10;
constexpr int MAX_THREADS = 1024;

using Kernel = void (*)(const void* params);

enum class Wait { none, warp, block, done };

struct Copy { void* shared; const void* source; bool valid; };

struct Fibre : Thread {
    Context context;
    Wait wait = Wait::none;
    int line = 0;
    void* argument = nullptr;
    void (*run)(void* const (&)[32]) = nullptr;
    std::vector<Copy> copies;
    unsigned warp_time = 0;
};

struct Device {
    unsigned char* memory;
    unsigned char* state;
    size_t used = GAP;
    std::map<size_t, std::vector<unsigned char*>> released;  // by size
    unsigned char* stacks;
    uint64_t exponentials = 0, multiply_adds = 0, copied = 0;
    // Pages of global memory that the launch has accessed, if asked for: bit 0 read, bit 1 written.
    unsigned char* touched = nullptr;
    std::vector<uint32_t> pages;

    // The running block.
    std::vector<Fibre> fibres;
    Fibre* running = nullptr;
    Context scheduler;
    Kernel kernel = nullptr;
    const void* params = nullptr;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    unsigned block_time = 0;
    bool vote = false, voted = false;  // of the next barrier; of the last barrier
    std::vector<Touch> writes, reads;
    Touch now;  // an access of the running fibre
    bool failed = false;
    char message[512];

    static unsigned char* reserve(size_t bytes) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        return static_cast<unsigned char*>(p);
    }
    Device() : memory(reserve(ARENA)), state(reserve(ARENA)), stacks(reserve(STACK * MAX_THREADS)) {}
    ~Device() {
        munmap(memory, ARENA);
        munmap(state, ARENA);
        if (touched) munmap(touched, ARENA / PAGE);
        munmap(stacks, STACK * MAX_THREADS);
    }

    // Records a fault of the running fibre. Only the first is kept.
    __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        if (!failed) {
            failed = true;
            va_list list;
            va_start(list, format);
            const int n = vsnprintf(message, sizeof message, format, list);
            va_end(list);
            if (running && n > 0 && size_t(n) < sizeof message) {
                snprintf(message + n, sizeof message - n, " (block %u,%u thread %u)", running->block_index.x,
                         running->block_index.y, running->thread_index.x);
            }
        }
    }
};

static thread_local Device* device = nullptr;

static void leave(Device& d) { change(d.running->context, d.scheduler); }

static Touch touch_now(const Device& d, const Fibre& fibre) {
    return {.block_time = d.block_time, .warp_time = fibre.warp_time, .next_thread = fibre.thread_index.x + 1};
}
static bool ordered(Touch before, Touch now) {
    if (before.next_thread == 0 || before.next_thread == now.next_thread || before.block_time != now.block_time) return true;
    return before.thread() / 32 == now.thread() / 32 && before.warp_time != now.warp_time;
}
// Whether the last accesses of `bytes` bytes are one access, as they mostly are.
template <size_t bytes> static bool together(const Touch* before) {
    bool equal = true;
    for (size_t i = 1; i < bytes; ++i) equal &= before[i] == before[0];
    return equal;
}

// Whether the state of the bytes allows the access. Reads need WRITTEN or READ_ONLY, which share a
// bit; writes need UNWRITTEN or WRITTEN, which have one bit each.
static_assert(NONE == 0 && UNWRITTEN == 1 && WRITTEN == 2 && READ_ONLY == 3);
template <class Word> static bool is_sound(const unsigned char* state, Access kind) {
    constexpr Word ones = Word(0x0101010101010101);
    Word word;
    memcpy(&word, state, sizeof word);
    const Word high = word >> 1;
    return ((kind == Access::read ? high : Word(word ^ high)) & ones) == ones;
}
template <size_t bytes> static bool is_sound(const unsigned char* state, Access kind) {
    if constexpr (bytes == 16) return is_sound<uint64_t>(state, kind) && is_sound<uint64_t>(state + 8, kind);
    else if constexpr (bytes == 8) return is_sound<uint64_t>(state, kind);
    else if constexpr (bytes == 4) return is_sound<uint32_t>(state, kind);
    else if constexpr (bytes == 2) return is_sound<uint16_t>(state, kind);
    else return is_sound<uint8_t>(state, kind);
}

static void touch(Device& d, size_t offset, size_t bytes, Access kind) {
    const unsigned char bit = kind == Access::read ? 1 : 2;
    for (size_t page = offset / PAGE; page <= (offset + bytes - 1) / PAGE; ++page) {
        if (d.touched[page] == 0) d.pages.push_back(uint32_t(page));
        d.touched[page] |= bit;
    }
}

// A quick check, which nearly all accesses pass. True: the access is valid. False: nothing has
// changed, and `judge` examines each byte.
template <size_t bytes, Access kind> static bool is_plainly_valid(Device& d, const void* at, Touch now) {
    const size_t offset = static_cast<const unsigned char*>(at) - d.memory;
    if (offset >= ARENA) return reinterpret_cast<uintptr_t>(at) >= GAP;  // stack or constant
    // An aligned access lies in the arena as a whole.
    static_assert(ARENA % bytes == 0);
    if (offset % bytes != 0 || !is_sound<bytes>(d.state + offset, kind)) return false;
    const size_t s = static_cast<const unsigned char*>(at) - d.shared;
    if (s < d.shared_bytes) {
        Touch* writes = &d.writes[s];
        Touch* reads = &d.reads[s];
        if (!together<bytes>(writes) || !ordered(writes[0], now)) return false;
        if (kind == Access::write && (!together<bytes>(reads) || !ordered(reads[0], now))) return false;
        std::fill_n(kind == Access::read ? reads : writes, bytes, now);
    } else if (d.touched) {
        touch(d, offset, bytes, kind);
    }
    if (kind == Access::write) memset(d.state + offset, WRITTEN, bytes);
    return true;
}
static bool is_plainly_valid(Device& d, const void* at, size_t bytes, Access kind, Touch now) {
    const bool reads = kind == Access::read;
    switch (bytes) {
        case 4: return reads ? is_plainly_valid<4, Access::read>(d, at, now) : is_plainly_valid<4, Access::write>(d, at, now);
        case 8: return reads ? is_plainly_valid<8, Access::read>(d, at, now) : is_plainly_valid<8, Access::write>(d, at, now);
        case 16: return reads ? is_plainly_valid<16, Access::read>(d, at, now) : is_plainly_valid<16, Access::write>(d, at, now);
        default: return false;
    }
}

// Whether the access is valid. If not, records the fault.
static bool judge(Device& d, Fibre& fibre, const void* at, size_t bytes, Access kind) {
    const Touch now = touch_now(d, fibre);
    if (is_plainly_valid(d, at, bytes, kind, now)) return true;
    const auto address = static_cast<const unsigned char*>(at);
    const char* verb = kind == Access::read ? "read" : "write";
    if (reinterpret_cast<uintptr_t>(at) < GAP) {
        d.fail("%s of %zu bytes through a null or misaligned pointer", verb, bytes);
        return false;
    }
    if (address < d.memory || address >= d.memory + ARENA) return true;  // stack or constant
    const size_t offset = address - d.memory;
    // The halves of a gap belong to the allocations beside it.
    const bool is_shared = d.shared && address >= d.shared - GAP / 2 && address < d.shared + d.shared_bytes + GAP / 2;
    const char* space = is_shared ? "shared" : "global";
    if (bytes <= 16 && offset % bytes != 0) {
        d.fail("misaligned %s of %zu bytes of %s memory", verb, bytes, space);
        return false;
    }
    for (size_t i = offset; i < offset + bytes; ++i) {
        if (i >= ARENA || d.state[i] == NONE) {
            d.fail("out-of-bounds %s of %zu bytes of %s memory", verb, bytes, space);
            return false;
        }
        if (kind == Access::read && d.state[i] == UNWRITTEN) {
            d.fail("read of %zu bytes of uninitialized %s memory", bytes, space);
            return false;
        }
        if (kind == Access::write && d.state[i] == READ_ONLY) {
            d.fail("write of %zu bytes to an input", bytes);
            return false;
        }
        if (is_shared) {
            const size_t s = address - d.shared + (i - offset);
            if (!ordered(d.writes[s], now) || (kind == Access::write && !ordered(d.reads[s], now))) {
                d.fail("race: %s of %zu bytes of shared memory, accessed by thread %d without a barrier between", verb,
                       bytes, ordered(d.writes[s], now) ? d.reads[s].thread() : d.writes[s].thread());
                return false;
            }
            (kind == Access::read ? d.reads : d.writes)[s] = now;
        }
        if (kind == Access::write) d.state[i] = WRITTEN;
    }
    if (d.touched && !is_shared) touch(d, offset, bytes, kind);
    return true;
}

void access(const void* at, size_t bytes, Access kind) {
    Device* d = device;
    if (d == nullptr || d->running == nullptr) return;
    if (!judge(*d, *d->running, at, bytes, kind)) leave(*d);
}
template <size_t bytes, Access kind> static void access(const void* at) {
    Device* d = device;
    if (d == nullptr || d->running == nullptr || is_plainly_valid<bytes, kind>(*d, at, d->now)) return;
    access(at, bytes, kind);
}

void access_by(int lane, const void* at, size_t bytes, Access kind) {
    Device& d = *device;
    Fibre& fibre = d.fibres[d.running->thread_index.x / 32 * 32 + lane];
    judge(d, fibre, at, bytes, kind);
}

void start_copy(void* shared, const void* source, bool valid) {
    Device& d = *device;
    if (valid) access(source, 16, Access::read);
    if (valid) d.copied += 16;
    access(shared, 16, Access::write);
    memset(d.state + (static_cast<unsigned char*>(shared) - d.memory), UNWRITTEN, 16);
    d.running->copies.push_back({shared, source, valid});
}

void finish_copies() {
    Device& d = *device;
    for (const Copy& copy : d.running->copies) {
        access(copy.shared, 16, Access::write);
        if (copy.valid) memcpy(copy.shared, copy.source, 16);
        else memset(copy.shared, 0, 16);
    }
    d.running->copies.clear();
}

void count_exponential() { ++device->exponentials; }
void count_multiply_adds(size_t count) { device->multiply_adds += count; }

// ---------------------------------------------------------------- scheduling
static void wait_for(Wait wait, int line, void* argument, void (*run)(void* const (&)[32])) {
    Device& d = *device;
    Fibre& fibre = *d.running;
    fibre.wait = wait;
    fibre.line = line;
    fibre.argument = argument;
    fibre.run = run;
    leave(d);
}
void meet_warp(int line, void* argument, void (*run)(void* const (&)[32])) { wait_for(Wait::warp, line, argument, run); }
void meet_block(int line) { wait_for(Wait::block, line, nullptr, nullptr); }
bool meet_block_any(bool x, int line) {
    device->vote |= x;
    meet_block(line);
    return device->voted;
}

static void fibre_main() {
    Device& d = *device;
    d.kernel(d.params);
    d.running->wait = Wait::done;
    leave(d);
    abort();
}

static const char* place(Wait wait) {
    return wait == Wait::warp ? "a warp operation" : wait == Wait::block ? "__syncthreads" : "its end";
}

// Runs one warp until all its threads have finished or wait for the block. False on a fault.
static bool run_warp(Device& d, int first) {
    for (;;) {
        for (int i = first; i < first + 32; ++i) {
            Fibre& fibre = d.fibres[i];
            if (fibre.wait != Wait::none) continue;
            d.running = &fibre;
            self = &fibre;
            d.now = touch_now(d, fibre);
            change(d.scheduler, fibre.context);
            if (d.failed) return false;
        }
        const Fibre& one = d.fibres[first];
        for (int i = first + 1; i < first + 32; ++i) {
            const Fibre& other = d.fibres[i];
            if (other.wait == one.wait && (other.line == one.line || one.wait == Wait::done) && other.run == one.run) continue;
            d.running = &d.fibres[i];
            d.fail("divergence: thread %u is at %s (line %d) and thread %u at %s (line %d)", one.thread_index.x, place(one.wait),
                   one.line, other.thread_index.x, place(other.wait), other.line);
            return false;
        }
        if (one.wait != Wait::warp) return true;
        d.running = &d.fibres[first];
        d.now = touch_now(d, *d.running);
        if (one.run) {
            void* arguments[32];
            for (int i = 0; i < 32; ++i) arguments[i] = d.fibres[first + i].argument;
            one.run(arguments);
            if (d.failed) return false;
        }
        const bool barrier = one.run == nullptr;
        for (int i = first; i < first + 32; ++i) {
            d.fibres[i].wait = Wait::none;
            if (barrier) ++d.fibres[i].warp_time;
        }
    }
}

static bool run_block(Device& d, uint3 block, int threads) {
    memset(d.state + (d.shared - d.memory), UNWRITTEN, d.shared_bytes);
    d.writes.assign(d.shared_bytes, {});
    d.reads.assign(d.shared_bytes, {});
    d.vote = false;
    d.fibres.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fibre& fibre = d.fibres[i];
        fibre.thread_index = {unsigned(i), 0, 0};
        fibre.block_index = block;
        fibre.block_size = {unsigned(threads), 1, 1};
        fibre.shared = d.shared;
        fibre.wait = Wait::none;
        fibre.line = 0;
        fibre.run = nullptr;
        fibre.copies.clear();
        fibre.warp_time = 0;
        prepare(fibre.context, d.stacks + STACK * i, STACK, fibre_main);
    }
    for (;;) {
        for (int first = 0; first < threads; first += 32) {
            if (!run_warp(d, first)) return false;
        }
        const Fibre& one = d.fibres[0];
        for (int i = 32; i < threads; i += 32) {
            const Fibre& other = d.fibres[i];
            if (other.wait == one.wait && (other.line == one.line || one.wait == Wait::done)) continue;
            d.running = &d.fibres[i];
            d.fail("divergence: thread 0 is at %s (line %d) and thread %d at %s (line %d)", place(one.wait), one.line, i,
                   place(other.wait), other.line);
            return false;
        }
        if (one.wait == Wait::done) return true;
        ++d.block_time;
        d.voted = d.vote;
        d.vote = false;
        for (Fibre& fibre : d.fibres) fibre.wait = Wait::none;
    }
}

}  // namespace emulator

using namespace emulator;

extern "C" {

Device* dfar_emulator_new() { return new Device; }
void dfar_emulator_free(Device* d) { delete d; }

// Allocates memory between gaps; null if the arena is full.
static unsigned char* take(Device* d, size_t bytes) {
    const size_t at = (d->used + 255) & ~size_t(255);
    if (bytes > ARENA - GAP || at > ARENA - GAP - bytes) return nullptr;
    d->used = at + bytes + GAP;
    memset(d->state + at, UNWRITTEN, bytes);
    return d->memory + at;
}
void* dfar_emulator_allocate(Device* d, size_t bytes) {
    const auto found = d->released.find((bytes + 255) & ~size_t(255));
    if (found == d->released.end() || found->second.empty()) return take(d, bytes);
    unsigned char* at = found->second.back();
    found->second.pop_back();
    memset(d->state + (at - d->memory), UNWRITTEN, bytes);
    return at;
}
// Frees memory: an access is out of bounds until the next allocation.
void dfar_emulator_release(Device* d, void* at, size_t bytes) {
    memset(d->state + (static_cast<unsigned char*>(at) - d->memory), NONE, bytes);
    d->released[(bytes + 255) & ~size_t(255)].push_back(static_cast<unsigned char*>(at));
}
// Whether all bytes lie in allocated memory, without a gap.
bool dfar_emulator_owned(Device* d, const void* at, size_t bytes) {
    const auto address = static_cast<const unsigned char*>(at);
    if (address < d->memory || address + bytes > d->memory + ARENA) return false;
    for (const unsigned char* state = d->state + (address - d->memory); bytes--; ++state) {
        if (*state == NONE) return false;
    }
    return true;
}
// Finds a kernel by name; null if there is none.
const void* dfar_emulator_find(const char* module, const char* name) {
    for (const Entry* entry = entries; entry; entry = entry->next) {
        if (strcmp(entry->module, module) == 0 && strcmp(entry->name, name) == 0) return entry;
    }
    return nullptr;
}
// Marks bytes as written; `read_only`: as an input, which kernels may not write.
void dfar_emulator_mark(Device* d, void* at, size_t bytes, bool read_only) {
    memset(d->state + (static_cast<unsigned char*>(at) - d->memory), read_only ? READ_ONLY : WRITTEN, bytes);
}
// Removes bytes from an allocation: an access to them is out of bounds.
void dfar_emulator_disown(Device* d, void* at, size_t bytes) {
    memset(d->state + (static_cast<unsigned char*>(at) - d->memory), NONE, bytes);
}
// Number of uninitialized bytes.
size_t dfar_emulator_unwritten(Device* d, const void* at, size_t bytes) {
    size_t count = 0;
    const unsigned char* state = d->state + (static_cast<const unsigned char*>(at) - d->memory);
    for (size_t i = 0; i < bytes; ++i) count += state[i] == UNWRITTEN;
    return count;
}

// Operations executed by all launches so far.
void dfar_emulator_counts(const Device* d, uint64_t* exponentials, uint64_t* multiply_adds, uint64_t* copied) {
    *exponentials = d->exponentials;
    *multiply_adds = d->multiply_adds;
    *copied = d->copied;
}

// Size of the parameter struct, and __launch_bounds__.
void dfar_emulator_entry(const Entry* entry, size_t* params_bytes, int* threads, int* blocks) {
    *params_bytes = entry->params_bytes;
    *threads = entry->bounds.threads;
    *blocks = entry->bounds.blocks;
}

// First byte of the device's memory.
void* dfar_emulator_base(const Device* d) { return d->memory; }

// From now on, launches note which pages of 256 bytes they access.
void dfar_emulator_track(Device* d) {
    if (!d->touched) d->touched = Device::reserve(ARENA / PAGE);
}
// Calls `visit` for each page that the last launch accessed, and forgets them. `kinds`: bit 0 read,
// bit 1 written.
void dfar_emulator_touched(Device* d, void* context, void (*visit)(void* context, uint32_t page, unsigned char kinds)) {
    for (const uint32_t page : d->pages) {
        visit(context, page, d->touched[page]);
        d->touched[page] = 0;
    }
    d->pages.clear();
}

// Runs a grid, block by block. Returns null, or the message of the first fault.
const char* dfar_emulator_launch(Device* d, const Entry* entry, const void* params, unsigned grid_x, unsigned grid_y, unsigned threads,
                                 size_t shared_bytes) {
    d->failed = false;
    d->message[0] = 0;
    if (entry->bounds.threads && threads > unsigned(entry->bounds.threads)) {
        snprintf(d->message, sizeof d->message, "a block of %u threads; __launch_bounds__ allows %d", threads, entry->bounds.threads);
        return d->message;
    }
    if (threads == 0 || threads % 32 || threads > MAX_THREADS) {
        snprintf(d->message, sizeof d->message, "a block of %u threads", threads);
        return d->message;
    }
    const size_t used = d->used;
    d->shared_bytes = shared_bytes;
    d->shared = take(d, shared_bytes);
    if (d->shared == nullptr) return "out of memory";
    d->kernel = entry->run;
    d->params = params;
    device = d;
    for (unsigned y = 0; y < grid_y && !d->failed; ++y) {
        for (unsigned x = 0; x < grid_x && !d->failed; ++x) run_block(*d, {x, y, 0}, threads);
    }
    memset(d->state + (d->shared - d->memory), NONE, shared_bytes);
    device = nullptr;
    self = nullptr;
    d->running = nullptr;
    d->shared = nullptr;
    d->used = used;
    return d->failed ? d->message : nullptr;
}

// ---------------------------------------------------------------- the compiler's announcements
#define ANNOUNCE(n)                                                          \
    void __tsan_read##n(void* p) { access<n, Access::read>(p); }             \
    void __tsan_write##n(void* p) { access<n, Access::write>(p); }           \
    void __tsan_unaligned_read##n(void* p) { access<n, Access::read>(p); }   \
    void __tsan_unaligned_write##n(void* p) { access<n, Access::write>(p); }
ANNOUNCE(1) ANNOUNCE(2) ANNOUNCE(4) ANNOUNCE(8) ANNOUNCE(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, Access::read); }
void __tsan_write_range(void* p, size_t n) { access(p, n, Access::write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
