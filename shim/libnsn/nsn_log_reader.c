/* A session's side of the interest log: follows the file, and from file to file, into the session's routes. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_log_file.h"
#include "nsn_shared.h"

#define MOVES_MOST 64 /* files followed in one call: an nsnd that moves its log faster than it can be opened is broken */

struct opened {
    const struct nsn_log_header *header;
    struct nsn_log_header copy;
    size_t size;
};

static int map_file(int fd, uint64_t generation, struct opened *opened, char *error, size_t error_size)
{
    struct stat status;
    if (fstat(fd, &status))
        return nsn_explain(error, error_size, -errno, "log.%llu: %s", (unsigned long long)generation, strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size < NSN_LOG_HEADER_SIZE)
        return nsn_explain(error, error_size, -EPROTO, "log.%llu is not an interest log", (unsigned long long)generation);
    opened->size = (size_t)status.st_size;
    void *memory = mmap(NULL, opened->size, PROT_READ, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return nsn_explain(error, error_size, -errno, "log.%llu cannot be mapped: %s", (unsigned long long)generation,
                           strerror(errno));
    madvise(memory, opened->size, MADV_DONTFORK);
    madvise(memory, opened->size, MADV_DONTDUMP);
    opened->header = memory;
    memcpy(&opened->copy, memory, offsetof(struct nsn_log_header, number));
    int result = nsn_log_check_header(&opened->copy, &status, generation, error, error_size);
    if (result)
        munmap(memory, opened->size);
    return result;
}

static int open_file(int directory_fd, uint64_t generation, struct opened *opened, char *error, size_t error_size)
{
    char name[NSN_LOG_NAME_SIZE];
    nsn_log_name(name, generation);
    int fd = openat(directory_fd, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return nsn_explain(error, error_size, -errno, "%s cannot be opened: %s", name, strerror(errno));
    int result = map_file(fd, generation, opened, error, error_size);
    close(fd);
    return result;
}

static void use(struct nsn_log_reader *reader, const struct opened *opened)
{
    nsn_log_reader_close(reader);
    reader->header = opened->header;
    reader->mapped = opened->size;
    reader->generation = opened->copy.generation;
    reader->base = opened->copy.base;
    reader->applied = 0;
    reader->count = 0;
}

static int moved_too_often(const struct nsn_log_reader *reader, char *error, size_t error_size)
{
    return nsn_explain(error, error_size, -ENOENT, "the interest log in %s moved %d times while it was opened: restart nsnd",
                       reader->directory, MOVES_MOST);
}

/* Opens the file that is being written now. Files may go while they are looked for: each time the log moves. */
static int follow_in(struct nsn_log_reader *reader, int directory_fd, char *error, size_t error_size)
{
    uint64_t after = reader->header ? reader->generation : 0, generation = after + 1;
    bool search = after == 0;
    for (int attempt = 0; attempt < MOVES_MOST; attempt++) {
        struct opened opened;
        int result = search ? nsn_log_highest(directory_fd, UINT64_MAX, &generation) : 0;
        if (result || generation <= after)
            return nsn_explain(error, error_size, result ? result : -ENOENT,
                               "%s has no interest log that goes on: nsnd's files were removed; restart nsnd and connect again",
                               reader->directory);
        result = open_file(directory_fd, generation, &opened, error, error_size);
        search = result == -ENOENT;
        if (search)
            continue;
        if (result)
            return result;
        if (nsn_load_acquire(&opened.header->number) != NSN_LOG_MOVED) { /* pairs with retire()'s release store */
            use(reader, &opened);
            return 0;
        }
        munmap((void *)opened.header, opened.size);
        after = generation++;
    }
    return moved_too_often(reader, error, error_size);
}

static int follow(struct nsn_log_reader *reader, char *error, size_t error_size)
{
    int directory_fd = open(reader->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", reader->directory, strerror(errno));
    int result = follow_in(reader, directory_fd, error, error_size);
    close(directory_fd);
    return result;
}

int nsn_log_reader_open(struct nsn_log_reader *reader, const char *directory, char *error, size_t error_size)
{
    memset(reader, 0, sizeof(*reader));
    if (strlen(directory) >= sizeof(reader->directory))
        return nsn_explain(error, error_size, -ENAMETOOLONG, "%s is longer than %zu bytes", directory,
                           sizeof(reader->directory) - 1);
    strcpy(reader->directory, directory);
    return follow(reader, error, error_size);
}

void nsn_log_reader_close(struct nsn_log_reader *reader)
{
    if (reader->header)
        munmap((void *)reader->header, reader->mapped);
    reader->header = NULL;
    reader->mapped = 0;
}

static int apply_entry(const struct nsn_log_copy *copy, struct nsn_routes *routes)
{
    const struct nsn_log_entry *entry = &copy->entry;
    struct nsn_target target = {entry->slot, entry->generation, entry->sid};
    int result = 0;
    if (entry->op == NSN_LOG_ADD)
        result = nsn_routes_add(routes, target, copy->strings, entry->pattern_length, copy->strings + entry->pattern_length,
                                entry->queue_length);
    else if (entry->op == NSN_LOG_REMOVE)
        result = nsn_routes_remove(routes, target);
    else
        nsn_routes_remove_session(routes, entry->slot, entry->generation);
    /* the caller may have put its own interest into routes, or taken it out, before the log said so */
    return result == -EEXIST || result == -ENOENT ? 0 : result;
}

static int apply(struct nsn_log_reader *reader, struct nsn_routes *routes, uint64_t number)
{
    struct nsn_log_copy copy;
    if (number < reader->applied || number > reader->mapped - NSN_LOG_HEADER_SIZE)
        return -EPROTO;
    while (reader->applied != number) {
        int result = nsn_log_copy_entry(reader->header, reader->applied, number, &copy);
        if (!result)
            result = apply_entry(&copy, routes);
        if (result)
            return result == -ENOMEM ? result : -EPROTO;
        reader->applied += copy.entry.length;
        reader->count++;
    }
    return 0;
}

/* Goes over to the file that is written now, while the present one has been left. 1 when it did, 0 when it need not. */
static int leave_moved(struct nsn_log_reader *reader, struct nsn_routes *routes, uint64_t *number, char *error,
                       size_t error_size)
{
    int moved = 0;
    /* pairs with the release stores in commit_file() and retire() */
    while ((*number = nsn_load_acquire(&reader->header->number)) == NSN_LOG_MOVED) {
        int result = moved < MOVES_MOST ? follow(reader, error, error_size) : moved_too_often(reader, error, error_size);
        if (result)
            return result;
        nsn_routes_clear(routes);
        moved++;
    }
    return moved > 0;
}

int nsn_log_reader_replay(struct nsn_log_reader *reader, struct nsn_routes *routes, char *error, size_t error_size)
{
    uint64_t number;
    int moved = leave_moved(reader, routes, &number, error, error_size);
    if (moved < 0 || number == reader->applied)
        return moved;
    int result = apply(reader, routes, number);
    if (result)
        return nsn_explain(error, error_size, result, result == -ENOMEM ? "no memory to apply log.%llu behind byte %llu"
                                                                       : "log.%llu is broken behind byte %llu: restart nsnd",
                           (unsigned long long)reader->generation, (unsigned long long)reader->applied);
    return 1;
}
