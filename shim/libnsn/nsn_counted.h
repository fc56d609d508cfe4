/* Zeroed memory whose bytes are counted, for what states how much it holds. */
#ifndef NSN_COUNTED_H
#define NSN_COUNTED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

static inline void *nsn_take(size_t *bytes, size_t size)
{
    void *memory = calloc(1, size);
    if (memory)
        *bytes += size;
    return memory;
}

/* Takes NULL as well, which counts nothing. */
static inline void nsn_give(size_t *bytes, void *memory, size_t size)
{
    if (!memory)
        return;
    *bytes -= size;
    free(memory);
}

/* At least `wanted` bytes at *memory, whose contents are lost when it grows. */
static inline bool nsn_reserve(size_t *bytes, void **memory, size_t *size, size_t wanted)
{
    if (*size >= wanted)
        return true;
    size_t rounded = wanted + wanted / 2;
    void *fresh = nsn_take(bytes, rounded);
    if (!fresh)
        return false;
    nsn_give(bytes, *memory, *size);
    *memory = fresh;
    *size = rounded;
    return true;
}

#endif
