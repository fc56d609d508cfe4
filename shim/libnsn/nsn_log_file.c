/* Files of the interest log: their names, how one is opened, and how entries are read. */
#include "nsn_log_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nsn_error.h"

#define CHUNK (16u << 10) /* bytes read at once; an entry is never longer */

_Static_assert(CHUNK >= sizeof(struct nsn_log_entry) + 2 * NSN_SUBJECT_MAX + 8, "an entry fits");
_Static_assert(sizeof(struct nsn_log_header) == NSN_LOG_HEADER_SIZE, "entries begin behind the header");

void nsn_log_name(char name[NSN_LOG_NAME_SIZE], uint64_t generation)
{
    snprintf(name, NSN_LOG_NAME_SIZE, "log.%llu", (unsigned long long)generation);
}

static int check_header(const struct nsn_log_header *header, const char *path, uint64_t generation, char *error,
                        size_t error_size)
{
    if (header->magic != NSN_LOG_MAGIC)
        return nsn_explain(error, error_size, -EPROTO, "%s is not an interest log", path);
    if (header->version != NSN_LOG_VERSION)
        return nsn_explain(error, error_size, -EPROTONOSUPPORT,
                           "%s has layout version %u and this program knows version %d: upgrade the older of nsnd and this "
                           "program", path, header->version, NSN_LOG_VERSION);
    if (header->generation != generation)
        return nsn_explain(error, error_size, -EPROTO, "%s says that it is generation %llu", path,
                           (unsigned long long)header->generation);
    return 0;
}

int nsn_log_open(int directory_fd, const char *path, uint64_t generation, int flags, struct nsn_log_header *header, char *error,
                 size_t error_size)
{
    struct stat status;
    int fd = openat(directory_fd, path, flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), result = 0;
    ssize_t length = 0;
    if (fd < 0 || fstat(fd, &status) || (S_ISREG(status.st_mode) && (length = pread(fd, header, sizeof *header, 0)) < 0))
        result = nsn_explain(error, error_size, -errno, "%s cannot be opened: %s", path, strerror(errno));
    else if (length != sizeof *header)
        result = nsn_explain(error, error_size, -EPROTO, "%s is not an interest log", path);
    else
        result = check_header(header, path, generation, error, error_size);
    if (result && fd >= 0)
        close(fd);
    return result ? result : fd;
}

static bool entry_sound(const struct nsn_log_entry *entry, uint64_t left)
{
    if (entry->pattern_length > NSN_SUBJECT_MAX || entry->queue_length > NSN_SUBJECT_MAX || entry->length > left)
        return false;
    if (entry->length != nsn_log_entry_length(entry->pattern_length, entry->queue_length))
        return false;
    if (entry->op == NSN_LOG_ADD)
        return entry->pattern_length > 0;
    return (entry->op == NSN_LOG_REMOVE || entry->op == NSN_LOG_SESSION_GONE) && !entry->pattern_length && !entry->queue_length;
}

/* Takes the entries that are whole in these bytes, behind which the log has `more` ones. The bytes taken, or what take said. */
static int take_whole(const char *bytes, size_t length, uint64_t more, nsn_log_take take, void *context, size_t *taken)
{
    struct nsn_log_entry entry;
    for (*taken = 0; length - *taken >= sizeof entry; *taken += entry.length) {
        memcpy(&entry, bytes + *taken, sizeof entry);
        if (!entry_sound(&entry, length - *taken + more))
            return -EPROTO;
        if (entry.length > length - *taken)
            return 0;
        int result = take(context, &entry, bytes + *taken + sizeof entry);
        if (result)
            return result;
    }
    return 0;
}

int nsn_log_read(int fd, uint64_t *at, uint64_t end, nsn_log_take take, void *context)
{
    char chunk[CHUNK];
    while (*at != end) {
        size_t wanted = end - *at < sizeof chunk ? (size_t)(end - *at) : sizeof chunk, taken;
        ssize_t length = pread(fd, chunk, wanted, (off_t)(NSN_LOG_HEADER_SIZE + *at));
        if (length < 0 && errno == EINTR)
            continue;
        if (length < 0)
            return -errno;
        int result = take_whole(chunk, (size_t)length, end - *at - (uint64_t)length, take, context, &taken);
        *at += taken;
        if (result)
            return result;
        if (!taken) /* the file ends, or the log does, within an entry */
            return -EPROTO;
    }
    return 0;
}
