/* A session's side of the interest log: follows the head, from file to file, into the session's routes. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_log_file.h"
#include "nsn_shared.h"

#define MOVES_MOST 64 /* files followed in one call: an nsnd that moves its log faster than it can be opened is broken */

static uint64_t head_of(const struct nsn_log_reader *reader)
{
    return nsn_load_acquire(reader->head); /* pairs with the release store in commit_file() */
}

static int moved_too_often(const struct nsn_log_reader *reader, char *error, size_t error_size)
{
    return nsn_explain(error, error_size, -ENOENT, "the interest log in %s moved %d times while it was opened: restart nsnd",
                       reader->directory, MOVES_MOST);
}

/* Opens the file that the head names. It may go while it is opened, when the log moves. */
static int follow(struct nsn_log_reader *reader, char *error, size_t error_size)
{
    struct nsn_log_header header;
    char path[sizeof reader->directory + NSN_LOG_NAME_SIZE];
    uint64_t head = head_of(reader);
    if (reader->fd >= 0) /* the head has left it for good: its descriptor may be the last one */
        close(reader->fd);
    reader->fd = -1;
    for (int attempt = 0; attempt < MOVES_MOST; attempt++) {
        uint64_t generation = nsn_log_generation(head), before = head;
        if (!generation)
            return nsn_explain(error, error_size, -ENOENT, "%s has no interest log: restart nsnd", reader->directory);
        snprintf(path, sizeof path, "%s/log.%llu", reader->directory, (unsigned long long)generation);
        int fd = nsn_log_open(AT_FDCWD, path, generation, O_RDONLY, &header, error, error_size);
        if (fd >= 0) {
            reader->fd = fd;
            reader->reached = generation << NSN_LOG_COMMITTED_BITS;
            reader->base = header.base;
            reader->count = 0;
            return 0;
        }
        head = head_of(reader);
        if (fd != -ENOENT)
            return fd;
        if (head == before)
            return nsn_explain(error, error_size, fd, "%s is gone: nsnd's files were removed; restart nsnd and connect again",
                               path);
    }
    return moved_too_often(reader, error, error_size);
}

int nsn_log_reader_open(struct nsn_log_reader *reader, const char *directory, const uint64_t *head, char *error,
                        size_t error_size)
{
    memset(reader, 0, sizeof(*reader));
    if (strlen(directory) >= sizeof(reader->directory))
        return nsn_explain(error, error_size, -ENAMETOOLONG, "%s is longer than %zu bytes", directory,
                           sizeof(reader->directory) - 1);
    strcpy(reader->directory, directory);
    reader->fd = -1;
    reader->head = head;
    int result = follow(reader, error, error_size);
    if (result)
        nsn_log_reader_close(reader);
    return result;
}

void nsn_log_reader_close(struct nsn_log_reader *reader)
{
    if (reader->head && reader->fd >= 0)
        close(reader->fd);
    reader->head = NULL;
    reader->fd = -1;
}

struct applied {
    struct nsn_log_reader *reader;
    struct nsn_routes *routes;
};

static int apply_entry(void *context, const struct nsn_log_entry *entry, const char *strings)
{
    const struct applied *applied = context;
    struct nsn_target target = {entry->slot, entry->generation, entry->sid};
    int result = 0;
    if (entry->op == NSN_LOG_ADD)
        result = nsn_routes_add(applied->routes, target, strings, entry->pattern_length, strings + entry->pattern_length,
                                entry->queue_length);
    else if (entry->op == NSN_LOG_REMOVE)
        result = nsn_routes_remove(applied->routes, target);
    else
        nsn_routes_remove_session(applied->routes, entry->slot, entry->generation);
    /* the caller may have put its own interest into routes, or taken it out, before the log said so */
    if (result && result != -EEXIST && result != -ENOENT)
        return result == -ENOMEM ? result : -EPROTO;
    applied->reader->count++;
    return 0;
}

/* Goes over to the file that the head names. 1 when it did, 0 when it was there; *end is what is committed of that file. */
static int leave_moved(struct nsn_log_reader *reader, struct nsn_routes *routes, uint64_t *end, char *error, size_t error_size)
{
    uint64_t head;
    int moved = 0;
    while (nsn_log_generation(head = head_of(reader)) != nsn_log_generation(reader->reached)) {
        int result = moved < MOVES_MOST ? follow(reader, error, error_size) : moved_too_often(reader, error, error_size);
        if (result)
            return result;
        nsn_routes_clear(routes);
        moved++;
    }
    *end = nsn_log_committed(head);
    return moved > 0;
}

int nsn_log_reader_replay(struct nsn_log_reader *reader, struct nsn_routes *routes, char *error, size_t error_size)
{
    uint64_t end = 0;
    int moved = leave_moved(reader, routes, &end, error, error_size);
    if (moved < 0)
        return moved;
    uint64_t generation = nsn_log_generation(reader->reached), at = nsn_log_committed(reader->reached);
    if (at == end)
        return moved;
    struct applied applied = {reader, routes};
    int result = at < end ? nsn_log_read(reader->fd, &at, end, apply_entry, &applied) : -EPROTO;
    reader->reached = generation << NSN_LOG_COMMITTED_BITS | at;
    if (!result)
        return 1;
    return nsn_explain(error, error_size, result,
                       result == -ENOMEM ? "no memory to apply log.%llu behind byte %llu"
                       : result == -EPROTO ? "log.%llu is broken, or was cut, behind byte %llu: restart nsnd"
                                           : "log.%llu cannot be read behind byte %llu: %s",
                       (unsigned long long)generation, (unsigned long long)at, strerror(-result));
}
