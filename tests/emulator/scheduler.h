// Runs one CUDA kernel on the CPU: every thread of a block is a fiber, blocks run one after another.
//
// Fibers of a block share one OS thread and switch only at __syncthreads and at warp operations, so a run is
// deterministic, and the order of the threads is a parameter: a kernel whose result depends on it is wrong. A warp
// operation is complete when every live lane of its mask is at the same source line with the same mask; the scheduler
// then exchanges the values. Shared memory is filled with 0xff (NaN) before every block.
// Under ThreadSanitizer every fiber is a thread of its own that only barriers and warp operations order. To make such a
// thread takes a millisecond, so there are two teams of them that run one block after another; blocks that are neighbours
// in the grid are of different teams, and nothing orders them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <string>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUEMU_RUNTIME __attribute__((no_sanitize("thread")))  // the scheduler itself is not under test
#else
#define CUEMU_RUNTIME
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuemu {
using Place = std::source_location;

enum State : uint8_t { READY, AT_BARRIER, AT_WARP_OP, DONE };
enum Op : uint8_t { SYNCWARP, INDEX, XOR, UP, DOWN, BALLOT, ANY, ALL, ADD, MIN, MAX, MATCH };
constexpr size_t STACK = 64 << 10, GUARD = 4096, MAX_THREADS = 1024, MAX_SHARED = 227 << 10, MAX_STATIC_SHARED = 48 << 10;

struct Fiber {
    void* sp;
    char* stack;
    State state;
    uint3 tid;
    Place at;
    Op op;
    unsigned mask;
    int arg, width;
    uint64_t value, result;
    void *asan_fake_stack, *tsan_fiber;
};

// What the blocks of a team use one after another.
struct Team {
    char* stacks = nullptr;
    size_t n_stacks = 0;
    void* tsan_fibers[MAX_THREADS] = {};
    // Addresses by which TSan is told what orders two CUDA threads: the ends of this block and of the one before, the
    // barriers of the block, the operations of each warp.
    char ends[2], block, warps[MAX_THREADS / 32];
    unsigned turn = 0;  // of `ends`
};
#if defined(__SANITIZE_THREAD__)
constexpr unsigned TEAMS = 2;
#else
constexpr unsigned TEAMS = 1;
#endif

struct Runtime {
    std::vector<Fiber> fibers;
    Team teams[TEAMS];
    unsigned team = 0;
    Fiber* current = nullptr;
    void *main_sp = nullptr, *main_fake_stack = nullptr, *main_tsan_fiber = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_size = 0;
    char* dynamic_shared = nullptr;
    std::string error;
    void (*body)(void*) = nullptr;
    void* body_context = nullptr;
    uint64_t block_number = 0;  // counts the blocks of all launches
};
inline Runtime rt;

inline int thread_number() { return int(rt.current - rt.fibers.data()); }

// ---- switching between fibers ---------------------------------------------------------------------------------------

#if defined(__x86_64__)  // 20 times cheaper than swapcontext(), which makes two system calls a switch
extern "C" void cuemu_switch(void** save, void* load);
asm(R"(.pushsection .text
.weak cuemu_switch
.type cuemu_switch,@function
cuemu_switch: pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; popq %rcx; jmp *%rcx
.popsection)");
#else
#error "the emulator knows how to switch fibers on x86-64 only"
#endif

CUEMU_RUNTIME inline void to_scheduler(bool dying = false) {
    Fiber& me = *rt.current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(dying ? nullptr : &me.asan_fake_stack, rt.main_stack, rt.main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(rt.main_tsan_fiber, 1);
#endif
    cuemu_switch(&me.sp, rt.main_sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me.asan_fake_stack, &rt.main_stack, &rt.main_stack_size);
#endif
}

CUEMU_RUNTIME inline void resume(Fiber& fiber) {
    rt.current = &fiber;
    threadIdx = fiber.tid;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&rt.main_fake_stack, fiber.stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.tsan_fiber, 1);  // 1: switching does not order the two fibers
#endif
    cuemu_switch(&rt.main_sp, fiber.sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(rt.main_fake_stack, nullptr, nullptr);
#endif
}

CUEMU_RUNTIME inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &rt.main_stack, &rt.main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
    Team& team = rt.teams[rt.team];
    __tsan_acquire(&rt);
    __tsan_acquire(team.ends + !team.turn);
#endif
    rt.body(rt.body_context);
#if defined(__SANITIZE_THREAD__)
    __tsan_release(team.ends + team.turn);
#endif
    rt.current->state = DONE;
    to_scheduler(true);
    __builtin_trap();
}

// ---- what a CUDA thread calls ---------------------------------------------------------------------------------------

inline void fail(const std::string& message) {
    if (rt.error.empty()) rt.error = message;
}

inline std::string where(const Fiber& fiber) {
    const char* slash = std::strrchr(fiber.at.file_name(), '/');
    char text[400];
    snprintf(text, sizeof text, "thread (%u,%u,%u) at %s:%u", fiber.tid.x, fiber.tid.y, fiber.tid.z,
             slash ? slash + 1 : fiber.at.file_name(), unsigned(fiber.at.line()));
    return text;
}

CUEMU_RUNTIME inline void block_barrier(Place at) {
    Fiber& me = *rt.current;
    me.state = AT_BARRIER;
    me.at = at;
#if defined(__SANITIZE_THREAD__)
    char* order = &rt.teams[rt.team].block;
    __tsan_release(order);
    to_scheduler();
    __tsan_acquire(order);
#else
    to_scheduler();
#endif
}

template <class T>
CUEMU_RUNTIME inline T warp_op(Op op, unsigned mask, T value, int arg, int width, Place at) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    Fiber& me = *rt.current;
    me.state = AT_WARP_OP;
    me.at = at, me.op = op, me.mask = mask, me.arg = arg, me.width = width, me.value = 0;
    std::memcpy(&me.value, &value, sizeof value);
#if defined(__SANITIZE_THREAD__)
    char* order = rt.teams[rt.team].warps + thread_number() / 32;
    __tsan_release(order);
    to_scheduler();
    __tsan_acquire(order);
#else
    to_scheduler();
#endif
    T result;
    std::memcpy(&result, &me.result, sizeof result);
    return result;
}

// ---- the scheduler's side -------------------------------------------------------------------------------------------

// The lane that `lane` of a shuffle reads from.
inline int shuffle_source(const Fiber& fiber, int lane) {
    int low = lane & ~(fiber.width - 1), high = low + fiber.width;
    int source = fiber.op == INDEX ? low + (fiber.arg & (fiber.width - 1))
               : fiber.op == XOR   ? lane ^ fiber.arg
               : fiber.op == UP    ? lane - fiber.arg
                                   : lane + fiber.arg;
    return source < low || source >= high ? lane : source;
}

// Finish the warp operation that `lane` of the warp at `first` waits in, if every live lane of its mask is there.
CUEMU_RUNTIME inline bool finish_warp_op(size_t first, int lane) {
    Fiber* warp = rt.fibers.data() + first;
    int n = int(std::min<size_t>(32, rt.fibers.size() - first));
    const Fiber& one = warp[lane];
    if (!(one.mask >> lane & 1)) return fail(where(one) + ": its own lane is not in the mask"), false;
    unsigned live = 0, votes = 0;
    int64_t total = 0;
    for (int i = 0; i < n; ++i) {
        if (!(one.mask >> i & 1) || warp[i].state == DONE) continue;
        if (warp[i].state != AT_WARP_OP || warp[i].mask != one.mask) return false;
        if (warp[i].op != one.op || warp[i].at.line() != one.at.line())
            return fail("divergent warp operation: " + where(one) + " and " + where(warp[i])), false;
        int64_t x = int32_t(warp[i].value);
        total = !live ? x : one.op == ADD ? total + x : one.op == MIN ? std::min(total, x) : std::max(total, x);
        live |= 1u << i;
        votes |= unsigned((warp[i].value & 0xffffffffu) != 0) << i;
    }
    for (int i = 0; i < n; ++i) {
        if (!(live >> i & 1)) continue;
        Fiber& fiber = warp[i];
        switch (fiber.op) {
            case SYNCWARP: break;
            case BALLOT: fiber.result = votes; break;
            case ANY: fiber.result = votes != 0; break;
            case ALL: fiber.result = votes == live; break;
            case ADD: case MIN: case MAX: fiber.result = uint64_t(total); break;
            case MATCH:
                fiber.result = 0;
                for (int j = 0; j < n; ++j)
                    if ((live >> j & 1) && warp[j].value == fiber.value) fiber.result |= 1u << j;
                break;
            default: {
                int source = shuffle_source(fiber, i);
                if (!(live >> source & 1))
                    return fail(where(fiber) + ": shuffle reads lane " + std::to_string(source) + ", which takes no part"), false;
                fiber.result = warp[source].value;
            }
        }
    }
    for (int i = 0; i < n; ++i)
        if (live >> i & 1) warp[i].state = READY;
    return true;
}

// Let everybody pass __syncthreads, if they are all at the same one.
inline void finish_barrier(size_t n_done) {
    const Fiber* first = nullptr;
    for (Fiber& fiber : rt.fibers) {
        if (fiber.state != AT_BARRIER) continue;
        if (!first) first = &fiber;
        if (fiber.at.line() != first->at.line())
            return fail("divergent __syncthreads(): " + where(*first) + " and " + where(fiber));
        fiber.state = READY;
    }
    if (n_done)  // Volta and later let this pass; here it is an error, for it is hardly ever meant
        fail("__syncthreads() by part of the block: " + std::to_string(n_done) + " threads have exited; " + where(*first));
}

inline std::string deadlock() {
    std::string message = "deadlock:";
    State last = DONE;
    int n_done = 0, n_told = 0;
    for (Fiber& fiber : rt.fibers) {
        n_done += fiber.state == DONE;
        if (fiber.state != DONE && fiber.state != last && n_told++ < 6)
            message += std::string(fiber.state == AT_BARRIER ? " __syncthreads by " : " warp operation by ") + where(fiber) + ";";
        last = fiber.state;
    }
    return message + " " + std::to_string(n_done) + " threads exited";
}

struct Region { char* start; size_t size; };
inline Region regions[256];  // static shared variables of the kernel, seen so far
inline size_t n_regions;

__attribute__((no_sanitize("address", "thread"), noinline)) inline void fill_with_nan(Region region) {
    for (size_t i = 0; i < region.size; ++i) ((volatile char*)region.start)[i] = char(0xff);
}

CUEMU_RUNTIME __attribute__((noinline)) inline void register_shared(void* start, size_t size) {
    size_t total = size;
    for (size_t i = 0; i < n_regions; total += regions[i++].size)
        if (regions[i].start == start) return;
    if (n_regions == 256 || total > MAX_STATIC_SHARED) return fail("too much static __shared__ memory");
    regions[n_regions++] = {(char*)start, size};
    fill_with_nan(regions[n_regions - 1]);
}

enum Order { FORWARD, REVERSE, SHUFFLED };

CUEMU_RUNTIME inline void run_block(int order, unsigned seed) {
    size_t n = rt.fibers.size();
    std::vector<unsigned> turn(n);
    uint3 tid = {0, 0, 0};
    for (size_t i = 0; i < n; ++i) {
        Fiber& fiber = rt.fibers[i];
        fiber.state = READY;
        fiber.tid = tid;
        if (++tid.x == blockDim.x) tid.x = 0, ++tid.y;
        if (tid.y == blockDim.y) tid.y = 0, ++tid.z;
        fiber.stack = rt.teams[rt.team].stacks + i * (STACK + GUARD) + GUARD;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
        void** top = reinterpret_cast<void**>(fiber.stack + STACK);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(&fiber_entry);
        top -= 6;
        std::memset(top, 0, 48);
        fiber.sp = top;
        turn[i] = unsigned(order == REVERSE ? n - 1 - i : i);
#if defined(__SANITIZE_THREAD__)
        void*& own = rt.teams[rt.team].tsan_fibers[i];
        fiber.tsan_fiber = own ? own : own = __tsan_create_fiber(0);
#endif
    }
    if (order == SHUFFLED)
        for (size_t i = n; i-- > 1;) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(turn[i], turn[(seed >> 8) % (i + 1)]);
        }
    for (size_t i = 0; i < n_regions; ++i) fill_with_nan(regions[i]);
    for (;;) {
        bool moved = false;
        size_t n_done = 0, n_waiting = 0;
        for (unsigned i : turn)
            if (rt.fibers[i].state == READY) resume(rt.fibers[i]), moved = true;
        for (size_t i = 0; i < n && rt.error.empty(); ++i)
            if (rt.fibers[i].state == AT_WARP_OP && finish_warp_op(i & ~size_t(31), int(i & 31))) moved = true;
        for (Fiber& fiber : rt.fibers) n_done += fiber.state == DONE, n_waiting += fiber.state == AT_BARRIER;
        if (!rt.error.empty() || n_done == n) break;
        if (n_waiting && n_waiting + n_done == n)
            finish_barrier(n_done);
        else if (!moved)
            fail(deadlock());
        if (!rt.error.empty()) break;
    }
#if defined(__SANITIZE_THREAD__)
    if (!rt.error.empty())  // they are somewhere in the kernel
        for (void*& fiber : rt.teams[rt.team].tsan_fibers)
            if (fiber) __tsan_destroy_fiber(std::exchange(fiber, nullptr));
#endif
}

inline void map_stacks(Team& team, size_t n) {
    if (team.n_stacks >= n) return;
    if (team.stacks) munmap(team.stacks, team.n_stacks * (STACK + GUARD));
    team.stacks = (char*)mmap(nullptr, n * (STACK + GUARD), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (size_t i = 0; i < n; ++i) mprotect(team.stacks + i * (STACK + GUARD), GUARD, PROT_NONE);
    team.n_stacks = n;
}

struct Config {  // as emulator.py fills it in
    unsigned grid[3], block[3], shared;
    int order;
    unsigned seed;
};

inline void check(const Config& config) {
    size_t n = size_t(config.block[0]) * config.block[1] * config.block[2];
    if (!n || n > MAX_THREADS) fail("a block of " + std::to_string(n) + " threads");
    if (config.shared > MAX_SHARED) fail("more than 227 KiB of dynamic shared memory");
    if (config.grid[1] > 65535 || config.grid[2] > 65535) fail("grid y and z must be below 65536");
}

template <class F>
CUEMU_RUNTIME int run(const Config& config, F body, char* error, int error_size) {
    rt.error.clear();
    n_regions = 0;
    check(config);
    size_t n = size_t(config.block[0]) * config.block[1] * config.block[2];
    gridDim = {config.grid[0], config.grid[1], config.grid[2]};
    blockDim = {config.block[0], config.block[1], config.block[2]};
    rt.body = [](void* f) { (*static_cast<F*>(f))(); };
    rt.body_context = &body;
    if (rt.error.empty()) rt.fibers.assign(n, Fiber{});
    std::vector<char*> held;
#if defined(__SANITIZE_THREAD__)
    rt.main_tsan_fiber = __tsan_get_current_fiber();
#endif
    size_t n_blocks = size_t(config.grid[0]) * config.grid[1] * config.grid[2];
    for (size_t i = 0; i < n_blocks && rt.error.empty(); ++i) {
        blockIdx = {unsigned(i % config.grid[0]), unsigned(i / config.grid[0] % config.grid[1]),
                    unsigned(i / config.grid[0] / config.grid[1])};
        size_t room = (config.shared + 15) / 16 * 16 + (config.shared ? 0 : 16);
        rt.dynamic_shared = (char*)aligned_alloc(16, room);
        std::memset(rt.dynamic_shared, 0xff, config.shared);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(rt.dynamic_shared + config.shared, room - config.shared);
#endif
        rt.team = (blockIdx.x + blockIdx.y + blockIdx.z) % TEAMS;
        rt.teams[rt.team].turn ^= 1;
        map_stacks(rt.teams[rt.team], n);
#if defined(__SANITIZE_THREAD__)
        __tsan_release(&rt);
#endif
        ++rt.block_number;
        run_block(config.order, config.seed + unsigned(i));
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(rt.dynamic_shared, room);
#endif
#if defined(__SANITIZE_THREAD__)
        held.push_back(rt.dynamic_shared);  // freeing it now would have to order the blocks
#else
        free(rt.dynamic_shared);
#endif
        if (!rt.error.empty())
            rt.error += " [block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ")]";
    }
#if defined(__SANITIZE_THREAD__)
    for (Team& team : rt.teams) __tsan_acquire(team.ends), __tsan_acquire(team.ends + 1);
    for (char* memory : held) free(memory);
#endif
    snprintf(error, size_t(error_size), "%s", rt.error.c_str());
    return rt.error.empty() ? 0 : 1;
}

// ---- entry points: the loader adds CUEMU_KERNEL(name) for every kernel ------------------------------------------------

template <class... A>
int launch(void (*kernel)(A...), const Config* config, void** arguments, char* error, int error_size) {
    auto call = [&]<size_t... I>(std::index_sequence<I...>) {
        return run(*config, [=] { kernel(*static_cast<A*>(arguments[I])...); }, error, error_size);
    };
    return call(std::index_sequence_for<A...>{});
}

// "*f4 " for const float*, "i4 " for int, ...: what the launcher checks arguments against.
template <class T>
std::string code() {
    if constexpr (std::is_pointer_v<T>) return "*" + code<std::remove_cv_t<std::remove_pointer_t<T>>>();
    else if constexpr (std::is_void_v<T>) return "V";
    else return (std::is_floating_point_v<T> ? "f" : !std::is_integral_v<T> ? "s" : std::is_signed_v<T> ? "i" : "u") + std::to_string(sizeof(T));
}
template <class... A>
std::string signature(void (*)(A...)) {
    return ((code<A>() + " ") + ... + "");
}
}  // namespace cuemu

#define CUEMU_KERNEL(name)                                                                                    \
    extern "C" const char* cuemu_signature_##name() {                                                         \
        static std::string text = cuemu::signature(&name);                                                    \
        return text.c_str();                                                                                  \
    }                                                                                                         \
    extern "C" int cuemu_launch_##name(const cuemu::Config* config, void** arguments, char* error, int size) { \
        return cuemu::launch(&name, config, arguments, error, size);                                          \
    }
