/* Takes the place of libnsn's nsn_shared.h in the simulation: every word of shared memory is read and written by way of
 * the simulator, which may let another task run there, and keeps stores back as an x86 processor does. */
#ifndef NSN_SHARED_H
#define NSN_SHARED_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "simulator.h"

#define NSN_CACHE_LINE 64

static inline uint64_t nsn_load_relaxed(const uint64_t *word) { return sim_load(word, sizeof *word); }
static inline uint64_t nsn_load_acquire(const uint64_t *word) { return sim_load(word, sizeof *word); }
static inline uint32_t nsn_load_relaxed32(const uint32_t *word) { return (uint32_t)sim_load(word, sizeof *word); }
static inline uint32_t nsn_load_acquire32(const uint32_t *word) { return (uint32_t)sim_load(word, sizeof *word); }
static inline void nsn_store_relaxed(uint64_t *word, uint64_t value) { sim_store(word, value, sizeof *word); }
static inline void nsn_store_release(uint64_t *word, uint64_t value) { sim_store(word, value, sizeof *word); }
static inline void nsn_store_relaxed32(uint32_t *word, uint32_t value) { sim_store(word, value, sizeof *word); }
static inline void nsn_store_release32(uint32_t *word, uint32_t value) { sim_store(word, value, sizeof *word); }
static inline void nsn_fence(void) { sim_fence(); }
static inline void nsn_copy_to_shared(void *destination, const void *source, size_t length)
{
    sim_copy(destination, source, length);
}
#define nsn_debug_store() ((void)0)
#define nsn_copy_large_to_shared nsn_copy_to_shared
#define nsn_make_in_shared(type, destination, ...) sim_copy((destination), &(type){__VA_ARGS__}, sizeof(type))
static inline uint64_t nsn_now_ns(void) { return sim_now_ns(); }
static inline void nsn_cpu_relax(void) { sim_point(); }

#endif
