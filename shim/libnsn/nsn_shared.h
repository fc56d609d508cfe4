/* Words of memory that several processes see: how they are read and written.
 *
 * Every shared word has one writer. The owner keeps a private copy and never reads the word back; whoever reads it copies
 * it once, checks the copy, and uses the copy. All stores to shared memory go through this file, so that a debug build
 * (-DNSN_DEBUG_STORES) can end the process behind any of them.
 */
#ifndef NSN_SHARED_H
#define NSN_SHARED_H

#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include "nsn_copy.h"

#define NSN_CACHE_LINE 64

#ifdef NSN_DEBUG_STORES
void nsn_debug_store(void); /* counts; ends the process with SIGKILL at the chosen store */
#else
#define nsn_debug_store() ((void)0)
#endif

static inline uint64_t nsn_load_relaxed(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint64_t nsn_load_acquire(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline uint32_t nsn_load_relaxed32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint32_t nsn_load_acquire32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static inline void nsn_store_relaxed(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
    nsn_debug_store();
}

static inline void nsn_store_release(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    nsn_debug_store();
}

static inline void nsn_store_relaxed32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
    nsn_debug_store();
}

static inline void nsn_store_release32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    nsn_debug_store();
}

/* Orders an earlier store before a later load (Dekker's pattern). Each use says which other fence it pairs with. */
static inline void nsn_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Bytes that a later release store makes visible. */
static inline void nsn_copy_to_shared(void *destination, const void *source, size_t length)
{
    if (length) /* a null source is legal for nothing */
        memcpy(destination, source, length);
    nsn_debug_store();
}

/* The same, of many bytes. */
static inline void nsn_copy_large_to_shared(void *destination, const void *source, size_t length)
{
    nsn_copy_large(destination, source, length);
    nsn_debug_store();
}

/* The same as nsn_copy_to_shared(), of a struct that is made where it goes: made elsewhere, field by field, it would have to
 * leave the store buffer before it can be copied. */
#define nsn_make_in_shared(type, destination, ...) \
    do { \
        *(type *)(void *)(destination) = (type){__VA_ARGS__}; \
        nsn_debug_store(); \
    } while (0)

/* One clock for stamps and deadlines: CLOCK_MONOTONIC, which agrees between processors and between processes. */
static inline uint64_t nsn_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void nsn_cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
