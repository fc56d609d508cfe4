/* The table of sessions and their pages: nsnd's side that gives slots, and the map that a session has of both files. */
#include "nsn_slots.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_place.h"
#include "nsn_shared.h"

_Static_assert(sizeof(struct nsn_slot) == 64, "a slot is a cache line");
_Static_assert(sizeof(struct nsn_slots_file) == 4096 + NSN_SLOTS_MAX * sizeof(struct nsn_slot), "slots begin on a page");
_Static_assert(sizeof(struct nsn_page) == 4096, "one writer a page");
_Static_assert(sizeof(struct nsn_place) % 4096 == 0, "places can be punched");

#define FILE_MODE 0644 /* whom the directory lets in may read */
#define SLOTS_SIZE sizeof(struct nsn_slots_file)
#define PAGES_SIZE (NSN_SLOTS_MAX * sizeof(struct nsn_place))

struct nsn_slots {
    struct nsn_slots_file *file;
    struct nsn_place *places;
    int directory_fd, pages_fd;
    uint32_t highest;
    uint64_t others;
    const struct nsn_place *other[NSN_SLOTS_MAX]; /* places of others, attached; NULL: none, or it is gone */
    struct nsn_slot slot[NSN_SLOTS_MAX]; /* what nsnd itself goes by; the file is for the others */
};

/* --- files -------------------------------------------------------------------------------------------------------- */

static int map_file(int fd, size_t size, int protection, void **memory)
{
    *memory = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    if (*memory == MAP_FAILED) {
        *memory = NULL;
        return -errno;
    }
    madvise(*memory, size, MADV_DONTFORK);
    madvise(*memory, size, MADV_DONTDUMP);
    return 0;
}

static int open_checked(int directory_fd, const char *name, int flags, size_t size, char *error, size_t error_size)
{
    struct stat status;
    int fd = openat(directory_fd, name, flags | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status)) {
        int result = -errno;
        if (fd >= 0)
            close(fd);
        return nsn_explain(error, error_size, result, "%s cannot be opened: %s", name, strerror(-result));
    }
    if (S_ISREG(status.st_mode) && (size_t)status.st_size == size)
        return fd;
    close(fd);
    return nsn_explain(error, error_size, -EPROTO,
                       "%s has %lld bytes and not %zu: it is of another version; end the programs that use this application ID "
                       "and remove its directory", name, (long long)status.st_size, size);
}

static int check_owner(int fd, const char *name, char *error, size_t error_size)
{
    struct stat status;
    if (fstat(fd, &status))
        return nsn_explain(error, error_size, -errno, "%s: %s", name, strerror(errno));
    if (status.st_uid == geteuid())
        return 0;
    return nsn_explain(error, error_size, -EACCES, "%s belongs to uid %u, not to this nsnd's %u: remove it", name,
                       status.st_uid, geteuid());
}

static int check_header(const struct nsn_slots_file *file, char *error, size_t error_size)
{
    struct { uint64_t magic; uint32_t version, count; } copy;
    memcpy(&copy, file, sizeof(copy));
    if (copy.magic != NSN_SLOTS_MAGIC || copy.count != NSN_SLOTS_MAX)
        return nsn_explain(error, error_size, -EPROTO, "slots is not a table of sessions");
    if (copy.version != NSN_SLOTS_VERSION)
        return nsn_explain(error, error_size, -EPROTONOSUPPORT,
                           "slots has layout version %u and this program knows version %d: upgrade the older of nsnd and this "
                           "program", copy.version, NSN_SLOTS_VERSION);
    return 0;
}

/* A file of the given size under a temporary name; `allocated` bytes of it have memory. */
static int create(int directory_fd, const char *name, size_t size, size_t allocated)
{
    unlinkat(directory_fd, name, 0);
    int fd = openat(directory_fd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -errno;
    if (fchmod(fd, FILE_MODE) == 0 && ftruncate(fd, (off_t)size) == 0 && (!allocated || fallocate(fd, 0, 0, (off_t)allocated) == 0))
        return fd;
    int result = -errno;
    unlinkat(directory_fd, name, 0);
    close(fd);
    return result;
}

static int rename_in(int directory_fd, const char *from, const char *to)
{
    return renameat(directory_fd, from, directory_fd, to) ? -errno : 0;
}

static int create_pages(int directory_fd)
{
    int fd = create(directory_fd, "pages.new", PAGES_SIZE, 0);
    if (fd < 0)
        return fd;
    close(fd);
    return rename_in(directory_fd, "pages.new", "pages");
}

static int create_slots(int directory_fd)
{
    int fd = create(directory_fd, "slots.new", SLOTS_SIZE, SLOTS_SIZE);
    if (fd < 0)
        return fd;
    void *memory;
    int result = map_file(fd, SLOTS_SIZE, PROT_READ | PROT_WRITE, &memory);
    close(fd);
    if (result)
        return result;
    struct nsn_slots_file *file = memory;
    nsn_store_relaxed(&file->magic, NSN_SLOTS_MAGIC);
    nsn_store_relaxed32(&file->version, NSN_SLOTS_VERSION);
    nsn_store_relaxed32(&file->count, NSN_SLOTS_MAX);
    munmap(memory, SLOTS_SIZE);
    return rename_in(directory_fd, "slots.new", "slots");
}

/* `slots` comes last: where it is, both files are whole. */
static int create_missing(int directory_fd, char *error, size_t error_size)
{
    struct stat status;
    if (fstatat(directory_fd, "slots", &status, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    int result = errno == ENOENT ? create_pages(directory_fd) : -errno;
    if (!result)
        result = create_slots(directory_fd);
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
        return nsn_explain(error, error_size, -EPROTO, "slots says that %llu slots were used, of %d", (unsigned long long)highest,
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
        others |= slot->alive && slot->other;
        if (slot->alive && slot->other) /* one that is gone cannot be attached, and its process is found dead by the caller */
            nsn_place_attach(&slots->other[i], slot->segment, slot->uid, 0, error, error_size);
    }
    if (others) /* the nsnd before this one may have died just before it said so */
        others_changed(slots);
    return 0;
}

static int open_slots(struct nsn_slots *slots, char *error, size_t error_size)
{
    void *memory;
    int fd = open_checked(slots->directory_fd, "slots", O_RDWR, SLOTS_SIZE, error, error_size);
    if (fd < 0)
        return fd;
    int result = check_owner(fd, "slots", error, error_size);
    if (!result && (result = map_file(fd, SLOTS_SIZE, PROT_READ | PROT_WRITE, &memory)))
        nsn_explain(error, error_size, result, "slots cannot be mapped: %s", strerror(-result));
    close(fd);
    if (result)
        return result;
    slots->file = memory;
    return check_header(slots->file, error, error_size);
}

static int open_pages(struct nsn_slots *slots, char *error, size_t error_size)
{
    void *memory;
    slots->pages_fd = open_checked(slots->directory_fd, "pages", O_RDWR, PAGES_SIZE, error, error_size);
    if (slots->pages_fd < 0)
        return slots->pages_fd;
    int result = check_owner(slots->pages_fd, "pages", error, error_size);
    if (!result && (result = map_file(slots->pages_fd, PAGES_SIZE, PROT_READ | PROT_WRITE, &memory)))
        nsn_explain(error, error_size, result, "pages cannot be mapped: %s", strerror(-result));
    if (!result)
        slots->places = memory;
    return result;
}

static int start(struct nsn_slots *slots, const char *directory, char *error, size_t error_size)
{
    slots->directory_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (slots->directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    int result = create_missing(slots->directory_fd, error, error_size);
    if (!result)
        result = open_slots(slots, error, error_size);
    if (!result)
        result = open_pages(slots, error, error_size);
    return result ? result : take_over(slots, error, error_size);
}

int nsn_slots_open(struct nsn_slots **out, const char *directory, char *error, size_t error_size)
{
    struct nsn_slots *slots = calloc(1, sizeof(*slots));
    if (!slots)
        return nsn_explain(error, error_size, -ENOMEM, "no memory for the sessions of %s", directory);
    slots->directory_fd = slots->pages_fd = -1;
    int result = start(slots, directory, error, error_size);
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
    if (slots->file)
        munmap(slots->file, SLOTS_SIZE);
    if (slots->places)
        munmap(slots->places, PAGES_SIZE);
    if (slots->pages_fd >= 0)
        close(slots->pages_fd);
    if (slots->directory_fd >= 0)
        close(slots->directory_fd);
    free(slots);
}

const struct nsn_slots_file *nsn_slots_view(const struct nsn_slots *slots) { return slots->file; }

struct nsn_place *nsn_slots_place(const struct nsn_slots *slots, uint32_t slot)
{
    if (slot >= NSN_SLOTS_MAX)
        return NULL;
    bool other = slots->slot[slot].alive && slots->slot[slot].other;
    return other ? (struct nsn_place *)(uintptr_t)slots->other[slot] : &slots->places[slot];
}

/* Zeroes a place, and allocates it: a write into a hole of a full file system is SIGBUS for whoever makes it. */
static int renew_place(struct nsn_slots *slots, uint32_t slot)
{
    off_t start = (off_t)(slot * sizeof(struct nsn_place)), length = sizeof(struct nsn_place);
    if (fallocate(slots->pages_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length))
        return -errno;
    return fallocate(slots->pages_fd, 0, start, length) ? -errno : 0;
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
    nsn_store_relaxed32(&shared->other, slot->other);
}

static int claim(struct nsn_slots *slots, struct nsn_slot wanted, const struct nsn_place *place, uint32_t *generation)
{
    uint32_t number = 0;
    while (number < slots->highest && slots->slot[number].alive)
        number++;
    if (number == NSN_SLOTS_MAX)
        return -ENOSPC;
    int result = renew_place(slots, number);
    if (result)
        return result;
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
    const struct nsn_place *place;
    struct nsn_slot slot = {.identity = {identity[0], identity[1]}, .start_time = start_time, .pid = pid, .uid = uid,
                            .segment = segment, .other = 1};
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
    if (!slots->slot[slot].other)
        return;
    slots->slot[slot].other = 0;
    if (slots->other[slot])
        nsn_place_detach(slots->other[slot]);
    slots->other[slot] = NULL;
    others_changed(slots);
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

static int map_named(int directory_fd, const char *name, size_t size, int protection, void **memory, char *error,
                     size_t error_size)
{
    int fd = open_checked(directory_fd, name, protection & PROT_WRITE ? O_RDWR : O_RDONLY, size, error, error_size);
    if (fd < 0)
        return fd;
    int result = map_file(fd, size, protection, memory);
    close(fd);
    return result ? nsn_explain(error, error_size, result, "%s cannot be mapped: %s", name, strerror(-result)) : 0;
}

int nsn_slots_map(struct nsn_slots_map *map, const char *directory, bool other, char *error, size_t error_size)
{
    void *slots = NULL, *places = NULL;
    *map = (struct nsn_slots_map){NULL, NULL};
    int directory_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    int result = map_named(directory_fd, "slots", SLOTS_SIZE, PROT_READ, &slots, error, error_size);
    if (!result)
        result = check_header(slots, error, error_size);
    if (!result)
        result = map_named(directory_fd, "pages", PAGES_SIZE, other ? PROT_READ : PROT_READ | PROT_WRITE, &places, error, error_size);
    close(directory_fd);
    map->slots = slots;
    map->places = places;
    if (result)
        nsn_slots_unmap(map);
    return result;
}

void nsn_slots_unmap(struct nsn_slots_map *map)
{
    if (map->slots)
        munmap((void *)map->slots, SLOTS_SIZE);
    if (map->places)
        munmap(map->places, PAGES_SIZE);
    *map = (struct nsn_slots_map){NULL, NULL};
}
