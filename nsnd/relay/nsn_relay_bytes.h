/* Bytes that come at the end and go at the front. */
#ifndef NSN_RELAY_BYTES_H
#define NSN_RELAY_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NSN_BYTES_KEPT (256u << 10) /* of memory, once all are gone */

struct nsn_bytes {
    uint8_t *memory;
    size_t start, end, size;
};

static inline size_t nsn_bytes_length(const struct nsn_bytes *bytes) { return bytes->end - bytes->start; }

/* NULL while there is no memory. */
static inline uint8_t *nsn_bytes_front(const struct nsn_bytes *bytes)
{
    return bytes->memory ? bytes->memory + bytes->start : NULL;
}

/* Room for so many more at the end; what front() gave is no longer good. NULL: no memory. */
static inline uint8_t *nsn_bytes_room(struct nsn_bytes *bytes, size_t more)
{
    if (bytes->start && bytes->end + more > bytes->size) {
        memmove(bytes->memory, bytes->memory + bytes->start, nsn_bytes_length(bytes));
        bytes->end -= bytes->start;
        bytes->start = 0;
    }
    if (bytes->end + more > bytes->size) {
        size_t size = 2 * (bytes->end + more);
        uint8_t *memory = realloc(bytes->memory, size);
        if (!memory)
            return NULL;
        bytes->memory = memory;
        bytes->size = size;
    }
    return bytes->memory + bytes->end;
}

/* They were written into the room. */
static inline void nsn_bytes_added(struct nsn_bytes *bytes, size_t length) { bytes->end += length; }

static inline bool nsn_bytes_add(struct nsn_bytes *bytes, const void *added, size_t length)
{
    uint8_t *room = nsn_bytes_room(bytes, length);
    if (room && length)
        memcpy(room, added, length);
    if (room)
        bytes->end += length;
    return room != NULL;
}

static inline void nsn_bytes_free(struct nsn_bytes *bytes)
{
    free(bytes->memory);
    *bytes = (struct nsn_bytes){0};
}

static inline void nsn_bytes_take(struct nsn_bytes *bytes, size_t length)
{
    bytes->start += length;
    if (bytes->start < bytes->end)
        return;
    bytes->start = bytes->end = 0;
    if (bytes->size > NSN_BYTES_KEPT)
        nsn_bytes_free(bytes);
}

#endif
