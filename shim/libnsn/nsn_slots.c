/* The table of sessions and their places: nsnd's side that gives slots, and the map that a session has of both segments. */
#include "nsn_slots.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_place.h"
#include "nsn_segment.h"
#include "nsn_shared.h"

_Static_assert(sizeof(struct nsn_slot) == 64, "a slot is a cache line");
_Static_assert(sizeof(struct nsn_slots_file) == 4096 + NSN_SLOTS_MAX * sizeof(struct nsn_slot), "slots begin on a page");
_Static_assert(sizeof(struct nsn_page) == 4096, "one writer a page");
_Static_assert(sizeof(struct nsn_place) % 4096 == 0, "places begin on a page");

static bool is_other(const struct nsn_slot *slot)
{
    return slot->traits & NSN_SLOT_OTHER;
}

#define SLOTS_SIZE sizeof(struct nsn_slots_file)
#define PLACES_SIZE (NSN_SLOTS_MAX * sizeof(struct nsn_place))

struct nsn_slots {
    struct nsn_slots_file *file;
    struct nsn_place *places;
    int32_t segment; /* of the table */
    uint32_t highest;
    uint64_t others;
    const struct nsn_place *other[NSN_SLOTS_MAX]; /* places of others, attached; NULL: none, or it is gone */
    struct nsn_slot slot[NSN_SLOTS_MAX]; /* what nsnd itself goes by; the table is for the others */
};

/* --- the file that says where the table is ------------------------------------------------------------------------ */

#define NAME "slots"
#define NAME_NEW "slots.new"
#define FILE_MODE 0644 /* whom the directory lets in may read */
#define FORMAT "insane_nats slots %u segment %d token %016llx%016llx\n"
#define PATTERN "insane_nats slots %u segment %d token %16llx%16llx"

struct where { /* what the file says */
    uint32_t version;
    int32_t segment;
    uint64_t token[2];
    uint32_t uid; /* whose file it is */
};

static int read_where(int directory_fd, struct where *where, char *error, size_t error_size)
{
    char text[128];
    struct stat status;
    unsigned long long first, second;
    int fd = openat(directory_fd, NAME, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    ssize_t length = fd < 0 || fstat(fd, &status) ? -1 : pread(fd, text, sizeof text - 1, 0);
    int result = length < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    if (result)
        return nsn_explain(error, error_size, result, NAME " cannot be opened: %s", strerror(-result));
    text[length] = '\0';
    if (sscanf(text, PATTERN, &where->version, &where->segment, &first, &second) != 4)
        return nsn_explain(error, error_size, -EPROTO,
                           NAME " does not say where the table of sessions is: end the programs that use this application ID "
                           "and remove its directory");
    where->token[0] = first, where->token[1] = second;
    where->uid = status.st_uid;
    return 0;
}

static int write_where(int directory_fd, const struct where *where)
{
    char text[128];
    int length = snprintf(text, sizeof text, FORMAT, where->version, where->segment, (unsigned long long)where->token[0],
                          (unsigned long long)where->token[1]);
    unlinkat(directory_fd, NAME_NEW, 0);
    int fd = openat(directory_fd, NAME_NEW, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -errno;
    ssize_t written = fchmod(fd, FILE_MODE) ? -1 : write(fd, text, (size_t)length);
    int result = written == length ? 0 : written < 0 ? -errno : -ENOSPC;
    close(fd);
    if (!result && renameat(directory_fd, NAME_NEW, directory_fd, NAME))
        result = -errno;
    if (result)
        unlinkat(directory_fd, NAME_NEW, 0);
    return result;
}

/* --- the table and the places ------------------------------------------------------------------------------------- */

/* Attaches both, and checks that they are what the file meant. -EIDRM when its number has come to mean something else. */
static int attach(const struct where *where, bool nsnd, bool other, struct nsn_slots_map *map, char *error, size_t error_size)
{
    struct nsn_segment_wanted wanted = {.size = SLOTS_SIZE, .uid = where->uid, .mode = NSN_SEGMENT_OWN, .writable = nsnd};
    void *memory;
    int result = nsn_segment_attach(&memory, where->segment, &wanted, error, error_size);
    if (!result)
        map->slots = memory;
    if (!nsn_segment_gone(result) && where->version != NSN_SLOTS_VERSION)
        return nsn_explain(error, error_size, -EPROTONOSUPPORT,
                           "the table of sessions has layout version %u and this program knows version %d: upgrade the older "
                           "of nsnd and this program", where->version, NSN_SLOTS_VERSION);
    if (result)
        return result;
    if (map->slots->magic != NSN_SLOTS_MAGIC || map->slots->token[0] != where->token[0] ||
        map->slots->token[1] != where->token[1] || map->slots->count != NSN_SLOTS_MAX)
        return nsn_explain(error, error_size, -EIDRM,
                           "segment %d is not the table of sessions that " NAME " means; are both in "
                           "one IPC namespace?", where->segment);
    wanted.size = PLACES_SIZE;
    wanted.writable = nsnd || !other;
    result = nsn_segment_attach(&memory, map->slots->places, &wanted, error, error_size);
    if (!result)
        map->places = memory;
    return result;
}

static int make(int directory_fd, struct nsn_slots *slots, char *error, size_t error_size)
{
    void *table, *places;
    int32_t number;
    struct where where = {.version = NSN_SLOTS_VERSION};
    if (getrandom(where.token, sizeof where.token, 0) != sizeof where.token)
        return nsn_explain(error, error_size, -errno, "no random bytes: %s", strerror(errno));
    int result = nsn_segment_make(&table, &where.segment, SLOTS_SIZE, NSN_SEGMENT_OWN, error, error_size);
    if (result)
        return result;
    slots->file = table;
    slots->segment = where.segment;
    result = nsn_segment_make(&places, &number, PLACES_SIZE, NSN_SEGMENT_OWN, error, error_size);
    if (result)
        return result;
    slots->places = places;
    nsn_store_relaxed(&slots->file->magic, NSN_SLOTS_MAGIC);
    nsn_store_relaxed32(&slots->file->count, NSN_SLOTS_MAX);
    nsn_store_relaxed(&slots->file->token[0], where.token[0]);
    nsn_store_relaxed(&slots->file->token[1], where.token[1]);
    nsn_store_relaxed32((uint32_t *)&slots->file->places, (uint32_t)number);
    result = write_where(directory_fd, &where); /* from now on others find it */
    return result ? nsn_explain(error, error_size, result, "no table of sessions can be made: %s", strerror(-result)) : 0;
}

/* --- nsnd's side -------------------------------------------------------------------------------------------------- */

static void others_changed(struct nsn_slots *slots)
{
    nsn_store_release(&slots->file->others, ++slots->others); /* pairs with the acquire load in nsn_others_look */
}

static int take_over(struct nsn_slots *slots, char *error, size_t error_size)
{
    uint64_t highest = nsn_load_acquire(&slots->file->highest); /* by an nsnd before this one */
    if (highest > NSN_SLOTS_MAX)
        return nsn_explain(error, error_size, -EPROTO, "slots says that %llu slots were used, of %d",
                           (unsigned long long)highest,
                           NSN_SLOTS_MAX);
    slots->highest = (uint32_t)highest;
    slots->others = slots->file->others;
    memcpy(slots->slot, slots->file->slot, sizeof(slots->slot));
    bool others = false;
    for (uint32_t i = 0; i < NSN_SLOTS_MAX; i++) {
        const struct nsn_slot *slot = &slots->slot[i];
        if (slot->alive && (slot->alive != slot->generation || i >= slots->highest))
            return nsn_explain(error, error_size, -EPROTO,
                               "slot %u is broken: end the programs that use this application ID and remove its directory", i);
        others |= slot->alive && is_other(slot);
        if (slot->alive && is_other(slot)) /* a gone one cannot be attached, and its process is found dead by the caller */
            nsn_place_attach(&slots->other[i], slot->segment, slot->uid, 0, error, error_size);
    }
    if (others) /* the nsnd before this one may have died just before it said so */
        others_changed(slots);
    return 0;
}

/* Whether all who knew what the file means are gone, and it with them: by now its number may mean something else, and that may
 * be somebody else's (-EACCES). */
static bool gone(int result) { return nsn_segment_gone(result) || result == -EPROTO || result == -EACCES; }

static int attach_or_make(struct nsn_slots *slots, int directory_fd, char *error, size_t error_size)
{
    struct where where;
    struct nsn_slots_map map = {NULL, NULL};
    int result = read_where(directory_fd, &where, error, error_size);
    if (result == -ENOENT)
        return make(directory_fd, slots, error, error_size);
    if (result)
        return result;
    if (where.uid != geteuid())
        return nsn_explain(error, error_size, -EACCES, NAME " belongs to uid %u, not to this nsnd's %u: remove it", where.uid,
                           geteuid());
    result = attach(&where, true, false, &map, error, error_size);
    if (result) {
        nsn_slots_unmap(&map);
        return gone(result) ? make(directory_fd, slots, error, error_size) : result;
    }
    slots->file = (struct nsn_slots_file *)(uintptr_t)map.slots;
    slots->places = map.places;
    slots->segment = where.segment;
    return take_over(slots, error, error_size);
}

int nsn_slots_open(struct nsn_slots **out, const char *directory, char *error, size_t error_size)
{
    int directory_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    struct nsn_slots *slots = calloc(1, sizeof(*slots));
    int result = slots ? attach_or_make(slots, directory_fd, error, error_size)
                       : nsn_explain(error, error_size, -ENOMEM, "no memory for the sessions of %s", directory);
    close(directory_fd);
    if (result) {
        nsn_slots_close(slots);
        return result;
    }
    *out = slots;
    return 0;
}

void nsn_slots_close(struct nsn_slots *slots)
{
    if (!slots)
        return;
    for (uint32_t i = 0; i < NSN_SLOTS_MAX; i++)
        if (slots->other[i])
            nsn_place_detach(slots->other[i]);
    nsn_slots_unmap(&(struct nsn_slots_map){slots->file, slots->places});
    free(slots);
}

int nsn_slots_share(struct nsn_slots *slots, bool shared)
{
    unsigned mode = shared ? NSN_SEGMENT_READ : NSN_SEGMENT_OWN;
    int result = nsn_segment_set_mode(slots->segment, mode);
    return result ? result : nsn_segment_set_mode(slots->file->places, mode);
}

uint64_t *nsn_slots_log(struct nsn_slots *slots) { return &slots->file->log; }

const struct nsn_slots_file *nsn_slots_view(const struct nsn_slots *slots) { return slots->file; }

struct nsn_place *nsn_slots_place(const struct nsn_slots *slots, uint32_t slot)
{
    if (slot >= NSN_SLOTS_MAX)
        return NULL;
    bool other = slots->slot[slot].alive && is_other(&slots->slot[slot]);
    return other ? (struct nsn_place *)(uintptr_t)slots->other[slot] : &slots->places[slot];
}

static uint64_t generation_after(uint64_t generation)
{
    uint32_t next = (uint32_t)generation + 1;
    return next ? next : 1; /* 0 says that nobody lives there */
}

static void write_slot(struct nsn_slot *shared, const struct nsn_slot *slot)
{
    nsn_store_relaxed(&shared->generation, slot->generation);
    nsn_store_relaxed(&shared->acknowledged, slot->acknowledged);
    nsn_store_relaxed(&shared->identity[0], slot->identity[0]);
    nsn_store_relaxed(&shared->identity[1], slot->identity[1]);
    nsn_store_relaxed(&shared->start_time, slot->start_time);
    nsn_store_relaxed32(&shared->pid, slot->pid);
    nsn_store_relaxed32(&shared->uid, slot->uid);
    nsn_store_relaxed32((uint32_t *)&shared->segment, (uint32_t)slot->segment);
    nsn_store_relaxed32(&shared->traits, slot->traits);
}

static int claim(struct nsn_slots *slots, struct nsn_slot wanted, const struct nsn_place *place, uint32_t *generation)
{
    uint32_t number = 0;
    while (number < slots->highest && slots->slot[number].alive)
        number++;
    if (number == NSN_SLOTS_MAX)
        return -ENOSPC;
    memset(&slots->places[number], 0, sizeof(struct nsn_place));
    struct nsn_slot *slot = &slots->slot[number], *shared = &slots->file->slot[number];
    uint64_t next = generation_after(slot->generation);
    wanted.alive = wanted.generation = next;
    *slot = wanted;
    slots->other[number] = place;
    write_slot(shared, slot);
    if (number == slots->highest)
        nsn_store_release(&slots->file->highest, ++slots->highest); /* pairs with the acquire load of whoever scans */
    nsn_store_release(&shared->alive, next); /* pairs with the acquire load of whoever asks whether the session lives */
    if (place)
        others_changed(slots); /* before the session knows of its slot, and so before it can say anything to anybody */
    *generation = (uint32_t)next;
    return (int)number;
}

int nsn_slots_claim(struct nsn_slots *slots, const uint64_t identity[2], uint32_t pid, uint64_t start_time, uint32_t uid,
                    uint32_t *generation)
{
    struct nsn_slot slot = {.identity = {identity[0], identity[1]}, .start_time = start_time, .pid = pid, .uid = uid};
    return claim(slots, slot, NULL, generation);
}

int nsn_slots_claim_other(struct nsn_slots *slots, const uint64_t identity[2], uint32_t pid, uint64_t start_time, uint32_t uid,
                          int32_t segment, uint32_t *generation, char *error, size_t error_size)
{
    const struct nsn_place *place = NULL;
    struct nsn_slot slot = {.identity = {identity[0], identity[1]}, .start_time = start_time, .pid = pid, .uid = uid,
                            .segment = segment, .traits = NSN_SLOT_OTHER};
    int result = nsn_place_attach(&place, segment, uid, pid, error, error_size);
    if (result < 0)
        return result;
    result = claim(slots, slot, place, generation);
    if (result < 0) {
        nsn_place_detach(place);
        return nsn_explain(error, error_size, result, "no place for a session: %s", strerror(-result));
    }
    return result;
}

int nsn_slots_find(const struct nsn_slots *slots, const uint64_t identity[2])
{
    for (uint32_t i = 0; i < slots->highest; i++) {
        const struct nsn_slot *slot = &slots->slot[i];
        if (slot->alive && slot->identity[0] == identity[0] && slot->identity[1] == identity[1])
            return (int)i;
    }
    return -ENOENT;
}

void nsn_slots_free_slot(struct nsn_slots *slots, uint32_t slot)
{
    if (slot >= slots->highest)
        return;
    slots->slot[slot].alive = 0;
    nsn_store_release(&slots->file->slot[slot].alive, 0); /* pairs as in claim */
    if (!is_other(&slots->slot[slot]))
        return;
    slots->slot[slot].traits = 0;
    if (slots->other[slot])
        nsn_place_detach(slots->other[slot]);
    slots->other[slot] = NULL;
    others_changed(slots);
}

void nsn_slots_speaks(struct nsn_slots *slots, uint32_t slot, uint32_t version_min, uint32_t version_max)
{
    if (slot >= slots->highest)
        return;
    struct nsn_slot *own = &slots->slot[slot];
    own->traits = (own->traits & NSN_SLOT_OTHER) | (version_min & 0xff) << 8 | (version_max & 0xff) << 16;
    nsn_store_relaxed32(&slots->file->slot[slot].traits, own->traits); /* the log's release store comes later */
}

void nsn_slots_acknowledge(struct nsn_slots *slots, uint32_t slot, uint64_t sequence)
{
    if (slot >= slots->highest)
        return;
    slots->slot[slot].acknowledged = sequence;
    /* pairs with the acquire load by which a session sees that its interest is in the log */
    nsn_store_release(&slots->file->slot[slot].acknowledged, sequence);
}

/* --- a session's side --------------------------------------------------------------------------------------------- */

int nsn_slots_map(struct nsn_slots_map *map, const char *directory, bool other, char *error, size_t error_size)
{
    struct where where;
    *map = (struct nsn_slots_map){NULL, NULL};
    int directory_fd = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    int result = read_where(directory_fd, &where, error, error_size);
    close(directory_fd);
    if (!result)
        result = attach(&where, false, other, map, error, error_size);
    if (result)
        nsn_slots_unmap(map);
    return result;
}

void nsn_slots_unmap(struct nsn_slots_map *map)
{
    if (map->slots)
        nsn_segment_detach(map->slots);
    if (map->places)
        nsn_segment_detach(map->places);
    *map = (struct nsn_slots_map){NULL, NULL};
}
