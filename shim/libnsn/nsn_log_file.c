/* Names and checks of the interest log's files. */
#include "nsn_log_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nsn_error.h"

void nsn_log_name(char name[NSN_LOG_NAME_SIZE], uint64_t generation)
{
    snprintf(name, NSN_LOG_NAME_SIZE, "log.%llu", (unsigned long long)generation);
}

static bool parse_name(const char *name, uint64_t *generation)
{
    if (strncmp(name, "log.", 4) != 0 || name[4] < '1' || name[4] > '9' || strlen(name) > 23)
        return false;
    char *end;
    *generation = strtoull(name + 4, &end, 10);
    return *end == '\0';
}

int nsn_log_highest(int directory_fd, uint64_t below, uint64_t *generation)
{
    int fd = openat(directory_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* a listing position of its own */
    DIR *listing = fd < 0 ? NULL : fdopendir(fd);
    if (!listing) {
        int result = -errno;
        if (fd >= 0)
            close(fd);
        return result;
    }
    bool found = false;
    uint64_t number;
    for (struct dirent *entry; (entry = readdir(listing));)
        if (parse_name(entry->d_name, &number) && number < below && (!found || number > *generation)) {
            *generation = number;
            found = true;
        }
    closedir(listing);
    return found ? 0 : -ENOENT;
}

int nsn_log_check_header(const struct nsn_log_header *header, const struct stat *status, uint64_t generation, char *error,
                         size_t error_size)
{
    unsigned long long shown = generation;
    if (header->magic != NSN_LOG_MAGIC)
        return nsn_explain(error, error_size, -EPROTO, "log.%llu is not an interest log", shown);
    if (header->version != NSN_LOG_VERSION)
        return nsn_explain(error, error_size, -EPROTONOSUPPORT,
                           "log.%llu has layout version %u and this program knows version %d: upgrade the older of nsnd and this "
                           "program", shown, header->version, NSN_LOG_VERSION);
    if (header->generation != generation || header->size != (uint64_t)status->st_size)
        return nsn_explain(error, error_size, -EPROTO, "log.%llu says that it is generation %llu with %llu bytes, but has %llu",
                           shown, (unsigned long long)header->generation, (unsigned long long)header->size,
                           (unsigned long long)status->st_size);
    return 0;
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

int nsn_log_copy_entry(const struct nsn_log_header *header, uint64_t at, uint64_t end, struct nsn_log_copy *copy)
{
    const char *source = (const char *)header + NSN_LOG_HEADER_SIZE + at;
    if (at > end || end - at < sizeof(copy->entry))
        return -EPROTO;
    memcpy(&copy->entry, source, sizeof(copy->entry));
    if (!entry_sound(&copy->entry, end - at))
        return -EPROTO;
    memcpy(copy->strings, source + sizeof(copy->entry), (size_t)copy->entry.pattern_length + copy->entry.queue_length);
    return 0;
}
