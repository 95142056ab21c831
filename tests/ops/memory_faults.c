/* Before the C library's functions in a process of a test: the n-th aligned_alloc from now on fails, or the n-th pthread_create. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

static atomic_int until_memory, until_thread; /* 0: nothing fails */

void fail_memory(int n) { atomic_store(&until_memory, n); }
void fail_thread(int n) { atomic_store(&until_thread, n); }

static int fails(atomic_int *until) { return atomic_load(until) > 0 && atomic_fetch_sub(until, 1) == 1; }

void *aligned_alloc(size_t alignment, size_t bytes)
{
    void *(*real)(size_t, size_t) = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
    return fails(&until_memory) ? NULL : real(alignment, bytes);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
        (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_NEXT, "pthread_create");
    return fails(&until_thread) ? EAGAIN : real(thread, attributes, start, argument);
}
