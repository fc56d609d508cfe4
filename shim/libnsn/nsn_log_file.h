/* What the two ends of the interest log share: the files' names, and the checks of what lies in one. Private to the log. */
#ifndef NSN_LOG_FILE_H
#define NSN_LOG_FILE_H

#include <sys/stat.h>

#include "nsn_log.h"
#include "nsn_subject.h"

#define NSN_LOG_NAME_SIZE 32

struct nsn_log_copy { /* an entry in private memory: what the strings say cannot change behind the check */
    struct nsn_log_entry entry;
    char strings[2 * NSN_SUBJECT_MAX]; /* pattern, queue */
};

void nsn_log_name(char name[NSN_LOG_NAME_SIZE], uint64_t generation);

/* The highest generation below `below` in the directory; 0 or -ENOENT, or what the directory said. */
int nsn_log_highest(int directory_fd, uint64_t below, uint64_t *generation);

/* 0, or a negative errno with words: the header is not that of a whole file of this generation and layout. */
int nsn_log_check_header(const struct nsn_log_header *header, const struct stat *status, uint64_t generation, char *error,
                         size_t error_size);

/* Bytes of a whole entry. */
static inline uint32_t nsn_log_entry_length(size_t pattern_length, size_t queue_length)
{
    return (uint32_t)((sizeof(struct nsn_log_entry) + pattern_length + queue_length + 7) & ~(size_t)7);
}

/* Copies the entry at `at` of a file whose entries end at `end` (both counted behind the header); 0, or -EPROTO. */
int nsn_log_copy_entry(const struct nsn_log_header *header, uint64_t at, uint64_t end, struct nsn_log_copy *copy);

#endif
