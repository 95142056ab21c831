/* The thread pool, scratch memory that outlives a call, and what happens where the system has none left.
 *
 * Of the tasks of a parallel region each thread has a stretch, which it goes through from its beginning: what lies side by side in
 * memory is read by one thread, and what was fetched ahead is what comes next. Whoever is done takes from the ends of the
 * others' stretches, so that a thread which the system has put aside delays nobody but its own task. Waiting threads spin for
 * about 0.1 ms, longer than the serial part of a layer, and then sleep: a sleeping thread costs 30-60 us to wake, and a decode
 * step has 150 regions.
 *
 * A task that cannot have its memory ends there, and tasks that have not begun are left out: no thread leaves a region but by its
 * end. Then the caller's thread leaves the call, for the ATTEMPT that it began with. */
#include "minillm_cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 1500
#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_t threads[MAX_THREADS];
static int n_threads = 1;

/* Tasks not taken of one thread's stretch: first << 32 | end, on a cache line of its own. */
static struct {
    _Alignas(64) _Atomic uint64_t tasks;
} stretches[MAX_THREADS];

static atomic_uint region; /* how many there have been */
static _Atomic int64_t done;
static atomic_int sleepers, stopping;
static Task *current;
static void *current_context;
static int sharing; /* whether the pool's threads are at tasks */

static void *slots[MAX_THREADS + 1][SLOTS];
static size_t slot_bytes[MAX_THREADS + 1][SLOTS];

EXPORT _Atomic int64_t minillm_missing; /* bytes that a call could not have; who made the call sets it back to 0 */
jmp_buf attempt;
static struct {
    _Alignas(64) jmp_buf end;
} tasks[MAX_THREADS]; /* where a thread goes on after a task */

/* A task of a thread's stretch, the first for that thread and the last for others; -1 if none is left. */
static int64_t take(int owner, int thread)
{
    uint64_t left = atomic_load(&stretches[owner].tasks);
    while (left >> 32 < (uint32_t)left)
        if (owner == thread) {
            if (atomic_compare_exchange_weak(&stretches[owner].tasks, &left, left + (1ull << 32)))
                return (int64_t)(left >> 32);
        } else if (atomic_compare_exchange_weak(&stretches[owner].tasks, &left, left - 1)) {
            return (int64_t)(uint32_t)left - 1;
        }
    return -1;
}

static void run(int64_t task, int thread)
{
    if (!atomic_load_explicit(&minillm_missing, memory_order_relaxed) && !_setjmp(tasks[thread].end))
        current(current_context, task, thread);
}

static void work(int thread)
{
    int64_t count = 0;
    for (int i = 0; i < n_threads; i++)
        for (int64_t task; (task = take((thread + i) % n_threads, thread)) >= 0; count++)
            run(task, thread);
    if (count)
        atomic_fetch_add(&done, count);
}

static void *worker(void *argument)
{
    const int thread = (int)(intptr_t)argument;
    unsigned seen = atomic_load(&region);
    while (!atomic_load(&stopping)) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&region, memory_order_relaxed) == seen; i++)
            RELAX();
        if (atomic_load(&region) == seen) {
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&region) == seen && !atomic_load(&stopping))
                pthread_cond_wait(&wake, &lock);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&lock);
        }
        if (atomic_load(&region) != seen) {
            seen = atomic_load(&region);
            work(thread);
        }
    }
    return NULL;
}

static void share(int64_t n_tasks, Task *task, void *context)
{
    current = task, current_context = context, sharing = 1;
    atomic_store(&done, 0);
    for (int64_t i = 0; i < n_threads; i++)
        atomic_store(&stretches[i].tasks, (uint64_t)(n_tasks * i / n_threads) << 32 | (uint64_t)(n_tasks * (i + 1) / n_threads));
    atomic_fetch_add(&region, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    work(0);
    for (int i = 0; atomic_load(&done) < n_tasks; i++)
        if (i < SPINS)
            RELAX();
        else
            sched_yield();
    sharing = 0;
    if (atomic_load(&minillm_missing))
        _longjmp(attempt, 1);
}

void parallel(int64_t n_tasks, Task *task, void *context)
{
    if (n_threads > 1 && n_tasks > 1) {
        share(n_tasks, task, context);
        return;
    }
    for (int64_t i = 0; i < n_tasks; i++)
        task(context, i, 0);
}

int pool_threads(void) { return n_threads; }

/* Stops the threads there are and starts n - 1 new ones. Returns how many threads there are now, the caller's among them. */
EXPORT int minillm_set_threads(int n)
{
    n = (int)most(1, least(n, MAX_THREADS));
    atomic_store(&stopping, 1);
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    for (int i = 1; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    atomic_store(&stopping, 0);
    for (n_threads = 1; n_threads < n; n_threads++)
        if (pthread_create(&threads[n_threads], NULL, worker, (void *)(intptr_t)n_threads))
            break;
    return n_threads;
}

/* A forked child has none of the other threads, and works alone; a thread that was just falling asleep must not leave it the lock. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void in_parent(void) { pthread_mutex_unlock(&lock); }
static void in_child(void)
{
    pthread_mutex_unlock(&lock);
    wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    atomic_store(&sleepers, 0);
    atomic_store(&stopping, 0);
    atomic_store(&minillm_missing, 0);
    sharing = 0, n_threads = 1;
}
__attribute__((constructor)) static void at_fork(void) { pthread_atfork(before_fork, in_parent, in_child); }

/* A child that is forked in the middle of it leaves the memory be: it must not find what was freed. */
static void give_back(int thread, int slot)
{
    void *memory = slots[thread][slot];
    slot_bytes[thread][slot] = 0;
    slots[thread][slot] = NULL;
    free(memory);
}

void *scratch(int thread, int slot, size_t bytes)
{
    if (!slots[thread][slot] || slot_bytes[thread][slot] < bytes) {
        give_back(thread, slot);
        bytes = (size_t)round_up((int64_t)(bytes ? bytes : 1), 4096); /* for nothing, too, there is an address */
        slots[thread][slot] = aligned_alloc(4096, bytes);
        if (!slots[thread][slot]) {
            atomic_store(&minillm_missing, (int64_t)bytes);
            _longjmp(sharing && thread != SHARED ? tasks[thread].end : attempt, 1);
        }
        slot_bytes[thread][slot] = bytes;
    }
    return slots[thread][slot];
}

/* Gives the scratch memory back. */
EXPORT void minillm_trim(void)
{
    for (int thread = 0; thread <= MAX_THREADS; thread++)
        for (int slot = 0; slot < SLOTS; slot++)
            give_back(thread, slot);
}
