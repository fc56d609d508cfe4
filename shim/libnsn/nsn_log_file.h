/* What the two ends of the interest log share: the files' names, how one is opened, and how entries are read. Private to the
 * log. */
#ifndef NSN_LOG_FILE_H
#define NSN_LOG_FILE_H

#include "nsn_log.h"
#include "nsn_subject.h"

#define NSN_LOG_NAME_SIZE 32

void nsn_log_name(char name[NSN_LOG_NAME_SIZE], uint64_t generation);

/* Opens the file at this path, and copies its header, which is that of a file of this layout and generation. The descriptor, or
 * a negative errno with words. flags: O_RDONLY or O_RDWR. */
int nsn_log_open(int directory_fd, const char *path, uint64_t generation, int flags, struct nsn_log_header *header,
                 char *error, size_t error_size);

static inline uint64_t nsn_round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

/* Bytes of a whole entry. */
static inline uint32_t nsn_log_entry_length(size_t pattern_length, size_t queue_length)
{
    return (uint32_t)((sizeof(struct nsn_log_entry) + pattern_length + queue_length + 7) & ~(size_t)7);
}

/* What is done with an entry; `strings`: pattern and queue, until it returns. Anything but 0 ends the reading. */
typedef int (*nsn_log_take)(void *context, const struct nsn_log_entry *entry, const char *strings);

/* Reads the entries from *at to `end` (both counted behind the header); *at comes behind each that was taken. 0; -EPROTO for an
 * entry that is broken, or a file that is shorter; what take returned; or what the file system said. */
int nsn_log_read(int fd, uint64_t *at, uint64_t end, nsn_log_take take, void *context);

#endif
