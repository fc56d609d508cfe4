/* Streams, sources and sinks behind their handles. A table grows by pages that never move. */
#include <stdlib.h>

#include "nsn_insane_internal.h"

#define PAGE 64u
#define PLACE_BITS 16
#define GENERATION_MAX 0x7fffu    /* a handle is never UINT32_MAX, and never 0 */

static struct nsn_thing *at(const struct nsn_things *things, uint32_t place)
{
    /* pairs with the release store in nsn_things_add() */
    struct nsn_thing *page = __atomic_load_n(&things->pages[place / PAGE], __ATOMIC_ACQUIRE);
    return page ? (struct nsn_thing *)((char *)page + (place % PAGE) * things->size) : NULL;
}

int nsn_things_init(struct nsn_things *things, size_t size)
{
    size_t all = (offsetof(struct nsn_thing, stream) + size + 15) & ~15ull;
    *things = (struct nsn_things){.pages = calloc((NSN_THINGS_MAX + PAGE) / PAGE, sizeof *things->pages), .size = all};
    return things->pages ? 0 : -1;
}

void nsn_things_free(struct nsn_things *things)
{
    for (uint32_t page = 0; things->pages && page <= NSN_THINGS_MAX / PAGE && things->pages[page]; page++)
        free(things->pages[page]);
    free(things->pages);
    things->pages = NULL;
}

static struct nsn_thing *free_place(struct nsn_things *things, uint32_t *place)
{
    for (uint32_t i = 0; things->free_count && i < things->used; i++) {
        struct nsn_thing *thing = at(things, i);
        if (thing->handle)
            continue;
        things->free_count--;
        *place = i;
        return thing;
    }
    if (things->used == NSN_THINGS_MAX)
        return NULL;
    if (things->used % PAGE == 0) {
        struct nsn_thing *page = calloc(PAGE, things->size);
        if (!page)
            return NULL;
        __atomic_store_n(&things->pages[things->used / PAGE], page, __ATOMIC_RELEASE); /* pairs with at() */
    }
    *place = things->used++;
    return at(things, *place);
}

struct nsn_thing *nsn_things_add(struct nsn_things *things)
{
    uint32_t place;
    struct nsn_thing *thing = free_place(things, &place);
    if (!thing)
        return NULL;
    thing->generation = thing->generation % GENERATION_MAX + 1;
    memset(&thing->stream, 0, things->size - offsetof(struct nsn_thing, stream));
    /* pairs with nsn_things_find() in a thread that has heard of the handle */
    __atomic_store_n(&thing->handle, thing->generation << PLACE_BITS | place, __ATOMIC_RELEASE);
    return thing;
}

struct nsn_thing *nsn_things_find(const struct nsn_things *things, uint32_t handle)
{
    uint32_t place = handle & ((1u << PLACE_BITS) - 1);
    if (place >= NSN_THINGS_MAX || !handle)
        return NULL;
    struct nsn_thing *thing = at(things, place);
    return thing && __atomic_load_n(&thing->handle, __ATOMIC_ACQUIRE) == handle ? thing : NULL;
}

struct nsn_thing *nsn_things_next(const struct nsn_things *things, uint32_t *place)
{
    while (*place < things->used) {
        struct nsn_thing *thing = at(things, (*place)++);
        if (thing->handle)
            return thing;
    }
    return NULL;
}

void nsn_things_remove(struct nsn_things *things, struct nsn_thing *thing)
{
    __atomic_store_n(&thing->handle, 0, __ATOMIC_RELEASE);
    things->free_count++;
}
