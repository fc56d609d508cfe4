/* Places of others: segments (nsn_segment.h) of one struct nsn_place each. */
#include "nsn_place.h"

#include "nsn_segment.h"

int nsn_place_make(struct nsn_place **place, int32_t *segment, char *error, size_t error_size)
{
    void *memory;
    int result = nsn_segment_make(&memory, segment, sizeof(struct nsn_place), NSN_SEGMENT_READ, error, error_size);
    if (!result)
        *place = memory;
    return result;
}

int nsn_place_attach(const struct nsn_place **place, int32_t segment, uint32_t uid, uint32_t pid, char *error,
                     size_t error_size)
{
    const struct nsn_segment_wanted wanted = {.size = sizeof(struct nsn_place), .uid = uid, .pid = pid,
                                              .mode = NSN_SEGMENT_READ};
    void *memory;
    int result = nsn_segment_attach(&memory, segment, &wanted, error, error_size);
    if (!result)
        *place = memory;
    return result;
}

void nsn_place_detach(const struct nsn_place *place) { nsn_segment_detach(place); }
