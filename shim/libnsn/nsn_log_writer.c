/* nsnd's side of the interest log: the table of live subscriptions, and the file that tells the sessions of it. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_log_file.h"
#include "nsn_protocol.h"
#include "nsn_shared.h"
#include "nsn_targets.h"

#define SIZE_DEFAULT (1u << 20)
#define ALLOCATE_STEP (1u << 16)  /* bytes of tmpfs taken at once */
#define DEAD_MOST (1u << 18)      /* bytes of dead entries that a session which connects may have to read in vain */
#define REMOVAL sizeof(struct nsn_log_entry)
#define TEMPORARY "log.new"
#define FILE_MODE 0644 /* whom the directory lets in may read */

struct record { /* a live subscription, as it will stand in the next snapshot */
    struct nsn_targets_entry entry;
    uint16_t pattern_length, queue_length;
    char strings[];
};

struct file {
    struct nsn_log_header *header;
    uint64_t size;
    uint64_t generation, base;
    uint64_t written, committed; /* bytes of entries */
    uint64_t count;              /* entries written */
    uint64_t allocated;          /* bytes of the file that certainly have memory */
    int fd;
};

struct nsn_log_writer {
    int directory_fd;
    struct file file;
    uint64_t first_size;
    uint64_t live_bytes; /* of the entries that made what is alive */
    uint64_t move_again; /* a move that failed is not tried again before this many bytes are written */
    struct nsn_targets targets;
};

static uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

static uint64_t live_count(const struct nsn_log_writer *writer) { return writer->targets.entries.count; }

/* --- files -------------------------------------------------------------------------------------------------------- */

/* Memory for entries up to `end` (behind the header), so that writing them cannot end in SIGBUS on a full file system. */
static int allocate(struct file *file, uint64_t end)
{
    uint64_t wanted = NSN_LOG_HEADER_SIZE + end;
    if (wanted <= file->allocated)
        return 0;
    uint64_t rounded = round_up(wanted, ALLOCATE_STEP);
    if (rounded > file->size)
        rounded = file->size;
    while (fallocate(file->fd, 0, (off_t)file->allocated, (off_t)(rounded - file->allocated)))
        if (errno != EINTR)
            return -errno;
    file->allocated = rounded;
    return 0;
}

static int map(struct file *file)
{
    void *memory = mmap(NULL, file->size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    madvise(memory, file->size, MADV_DONTFORK);
    madvise(memory, file->size, MADV_DONTDUMP);
    file->header = memory;
    return 0;
}

static void close_file(struct file *file)
{
    if (file->header)
        munmap(file->header, file->size);
    if (file->fd >= 0)
        close(file->fd);
    file->header = NULL;
    file->fd = -1;
}

static void write_entry(struct file *file, enum nsn_log_op op, struct nsn_target target, const char *pattern,
                        size_t pattern_length, const char *queue, size_t queue_length)
{
    struct nsn_log_entry entry = {nsn_log_entry_length(pattern_length, queue_length), (uint8_t)op, 0, (uint16_t)pattern_length,
                                  (uint16_t)queue_length, 0, target.slot, target.generation, target.sid};
    char *at = (char *)file->header + NSN_LOG_HEADER_SIZE + file->written;
    nsn_copy_to_shared(at, &entry, sizeof(entry));
    nsn_copy_to_shared(at + sizeof(entry), pattern, pattern_length);
    nsn_copy_to_shared(at + sizeof(entry) + pattern_length, queue, queue_length);
    file->written += entry.length;
    file->count++;
}

static void commit_file(struct file *file)
{
    nsn_store_relaxed(&file->header->count, file->count);
    nsn_store_release(&file->header->number, file->written); /* pairs with the acquire loads in nsn_log_reader.c */
    file->committed = file->written;
}

/* A file of the given size under the temporary name, empty, with memory for `needed` bytes of entries. */
static int create(struct nsn_log_writer *writer, struct file *file, uint64_t needed)
{
    unlinkat(writer->directory_fd, TEMPORARY, 0);
    file->fd = openat(writer->directory_fd, TEMPORARY, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    if (file->fd < 0)
        return -errno;
    int result = fchmod(file->fd, FILE_MODE) || ftruncate(file->fd, (off_t)file->size) ? -errno : 0;
    if (!result)
        result = allocate(file, needed);
    if (!result)
        result = map(file);
    if (result)
        return result;
    struct nsn_log_header header = {.magic = NSN_LOG_MAGIC, .version = NSN_LOG_VERSION, .generation = file->generation,
                                    .base = file->base, .size = file->size};
    nsn_copy_to_shared(file->header, &header, sizeof(header));
    return 0;
}

static int publish_name(struct nsn_log_writer *writer, const struct file *file)
{
    char name[NSN_LOG_NAME_SIZE];
    nsn_log_name(name, file->generation);
    return renameat(writer->directory_fd, TEMPORARY, writer->directory_fd, name) ? -errno : 0;
}

/* Sends the readers of a file on, and removes its name. */
static void retire(struct nsn_log_writer *writer, struct nsn_log_header *header, uint64_t generation)
{
    char name[NSN_LOG_NAME_SIZE];
    nsn_store_release(&header->number, NSN_LOG_MOVED); /* pairs with the acquire loads in nsn_log_reader.c */
    nsn_log_name(name, generation);
    unlinkat(writer->directory_fd, name, 0);
}

/* --- moving ------------------------------------------------------------------------------------------------------- */

static void write_snapshot(const struct nsn_log_writer *writer, struct file *file)
{
    const struct nsn_table *table = &writer->targets.entries;
    for (size_t bucket = 0; bucket <= table->mask; bucket++)
        for (struct nsn_item *item = table->buckets[bucket]; item; item = item->next) {
            struct record *record = nsn_container_of(item, struct record, entry.item);
            write_entry(file, NSN_LOG_ADD, record->entry.target, record->strings, record->pattern_length,
                        record->strings + record->pattern_length, record->queue_length);
        }
}

/* What the entries alive take, with room for their removals and `extra` bytes. */
static uint64_t needed_with(const struct nsn_log_writer *writer, uint64_t extra)
{
    return writer->live_bytes + live_count(writer) * REMOVAL + extra;
}

/* Goes over to a new file, which holds what is alive, what was not committed yet included. On failure nothing changed. */
static int move(struct nsn_log_writer *writer, uint64_t extra)
{
    struct file *old = &writer->file;
    uint64_t needed = needed_with(writer, extra);
    uint64_t size = round_up(NSN_LOG_HEADER_SIZE + 2 * needed, NSN_LOG_HEADER_SIZE);
    struct file fresh = {.generation = old->generation + 1, .base = old->base + old->count - live_count(writer), .fd = -1,
                         .size = size < writer->first_size ? writer->first_size : size};
    int result = create(writer, &fresh, needed);
    if (!result) {
        write_snapshot(writer, &fresh);
        commit_file(&fresh);
        result = publish_name(writer, &fresh);
    }
    if (result) {
        unlinkat(writer->directory_fd, TEMPORARY, 0);
        close_file(&fresh);
        return result;
    }
    if (old->header)
        retire(writer, old->header, old->generation);
    close_file(old);
    *old = fresh;
    writer->move_again = 0;
    return 0;
}

static void commit(struct nsn_log_writer *writer)
{
    struct file *file = &writer->file;
    if (file->committed != file->written)
        commit_file(file);
    uint64_t dead = file->written - writer->live_bytes;
    if (dead <= DEAD_MOST || dead <= 2 * writer->live_bytes || file->written < writer->move_again)
        return;
    /* a snapshot is for those who will connect; when there is no room for one the log goes on without */
    if (move(writer, 0))
        writer->move_again = file->written + DEAD_MOST;
}

/* --- changes, not committed yet ------------------------------------------------------------------------------------ */

static struct record *new_record(const char *pattern, size_t pattern_length, const char *queue, size_t queue_length)
{
    struct record *record = malloc(sizeof(*record) + pattern_length + queue_length);
    if (!record)
        return NULL;
    record->pattern_length = (uint16_t)pattern_length;
    record->queue_length = (uint16_t)queue_length;
    memcpy(record->strings, pattern, pattern_length);
    if (queue_length)
        memcpy(record->strings + pattern_length, queue, queue_length);
    return record;
}

/* Puts a subscription into the table: 0, -EEXIST, -ENOMEM. */
static int hold(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
                const char *queue, size_t queue_length)
{
    struct record *record = new_record(pattern, pattern_length, queue, queue_length);
    if (!record)
        return -ENOMEM;
    int result = nsn_targets_add(&writer->targets, &record->entry, target);
    if (result)
        free(record);
    else
        writer->live_bytes += nsn_log_entry_length(pattern_length, queue_length);
    return result;
}

static void let_go(struct nsn_log_writer *writer, struct nsn_targets_entry *entry)
{
    struct record *record = nsn_container_of(entry, struct record, entry);
    writer->live_bytes -= nsn_log_entry_length(record->pattern_length, record->queue_length);
    nsn_targets_remove(&writer->targets, entry);
    free(record);
}

static size_t let_session_go(struct nsn_log_writer *writer, struct nsn_targets_session *session)
{
    size_t count = session->count;
    for (size_t i = 0; i < count; i++) /* the session ends with its last one */
        let_go(writer, session->first);
    return count;
}

/* Room for an entry that adds, and for the one that will remove it. */
static int make_room(struct nsn_log_writer *writer, uint64_t length)
{
    uint64_t end = writer->file.written + length + (live_count(writer) + 1) * REMOVAL;
    if (end > writer->file.size - NSN_LOG_HEADER_SIZE)
        return move(writer, length + REMOVAL);
    return allocate(&writer->file, end);
}

static int add(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
               const char *queue, size_t queue_length)
{
    if (pattern_length > NSN_SUBJECT_MAX || queue_length > NSN_SUBJECT_MAX || !nsn_pattern_valid(pattern, pattern_length))
        return -EINVAL;
    if (nsn_targets_find(&writer->targets, target))
        return -EEXIST;
    if (live_count(writer) >= NSN_LOG_SUBSCRIPTIONS_MAX)
        return -ENOSPC;
    int result = make_room(writer, nsn_log_entry_length(pattern_length, queue_length));
    if (!result)
        result = hold(writer, target, pattern, pattern_length, queue, queue_length);
    if (!result)
        write_entry(&writer->file, NSN_LOG_ADD, target, pattern, pattern_length, queue, queue_length);
    return result;
}

static int drop(struct nsn_log_writer *writer, struct nsn_target target)
{
    struct nsn_targets_entry *entry = nsn_targets_find(&writer->targets, target);
    if (!entry)
        return -ENOENT;
    let_go(writer, entry);
    write_entry(&writer->file, NSN_LOG_REMOVE, target, NULL, 0, NULL, 0);
    return 0;
}

/* --- public changes ------------------------------------------------------------------------------------------------ */

int nsn_log_writer_add(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length)
{
    int result = add(writer, target, pattern, pattern_length, queue, queue_length);
    commit(writer);
    return result;
}

int nsn_log_writer_remove(struct nsn_log_writer *writer, struct nsn_target target)
{
    int result = drop(writer, target);
    commit(writer);
    return result;
}

int nsn_log_writer_session_gone(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation)
{
    struct nsn_targets_session *session = nsn_targets_session(&writer->targets, slot, generation);
    if (!session)
        return 0;
    size_t count = let_session_go(writer, session);
    write_entry(&writer->file, NSN_LOG_SESSION_GONE, (struct nsn_target){slot, generation, 0}, NULL, 0, NULL, 0);
    commit(writer);
    return (int)count;
}

/* The change at *at of a batch, and the place of the next one. 0, or -EBADMSG. */
static int next_change(const uint8_t *batch, size_t length, size_t *at, struct nsn_interest_change *change, const char **strings)
{
    if (length - *at < sizeof(*change))
        return -EBADMSG;
    memcpy(change, batch + *at, sizeof(*change));
    size_t whole = round_up(sizeof(*change) + change->pattern_length + change->queue_length, 8);
    if (length - *at < whole)
        return -EBADMSG;
    if (change->op != NSN_INTEREST_ADD && (change->op != NSN_INTEREST_REMOVE || change->pattern_length || change->queue_length))
        return -EBADMSG;
    *strings = (const char *)batch + *at + sizeof(*change);
    *at += whole;
    return 0;
}

static int check_batch(const uint8_t *batch, size_t length, uint32_t count, uint32_t *failed)
{
    struct nsn_interest_change change;
    const char *strings;
    size_t at = 0;
    for (*failed = 0; *failed < count; ++*failed)
        if (next_change(batch, length, &at, &change, &strings))
            return -EBADMSG;
    return at == length ? 0 : -EBADMSG;
}

int nsn_log_writer_apply(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation, const uint8_t *batch, size_t length,
                         uint32_t count, uint32_t *failed)
{
    struct nsn_interest_change change;
    const char *strings = NULL;
    size_t at = 0;
    int result = check_batch(batch, length, count, failed);
    if (result)
        return result;
    for (uint32_t i = 0; i < count && !result; i++) {
        next_change(batch, length, &at, &change, &strings);
        struct nsn_target target = {slot, generation, change.sid};
        if (change.op == NSN_INTEREST_ADD)
            result = add(writer, target, strings, change.pattern_length, strings + change.pattern_length, change.queue_length);
        else
            result = drop(writer, target);
        if (result == -EEXIST || result == -ENOENT)
            result = 0;
        *failed = result ? i : count;
    }
    commit(writer);
    return result;
}

/* --- looking in ---------------------------------------------------------------------------------------------------- */

uint64_t nsn_log_writer_number(const struct nsn_log_writer *writer) { return writer->file.base + writer->file.count; }

size_t nsn_log_writer_count(const struct nsn_log_writer *writer) { return live_count(writer); }

size_t nsn_log_writer_session_count(const struct nsn_log_writer *writer, uint32_t slot, uint32_t generation)
{
    struct nsn_targets_session *session = nsn_targets_session(&writer->targets, slot, generation);
    return session ? session->count : 0;
}

int nsn_log_writer_visit(const struct nsn_log_writer *writer, nsn_log_visit visit, void *context)
{
    const struct nsn_table *table = &writer->targets.entries;
    for (size_t bucket = 0; bucket <= table->mask; bucket++)
        for (struct nsn_item *item = table->buckets[bucket]; item; item = item->next) {
            struct record *record = nsn_container_of(item, struct record, entry.item);
            int result = visit(context, record->entry.target, record->strings, record->pattern_length,
                               record->strings + record->pattern_length, record->queue_length);
            if (result)
                return result;
        }
    return 0;
}

/* --- life ---------------------------------------------------------------------------------------------------------- */

static int restore_entry(struct nsn_log_writer *writer, const struct nsn_log_copy *copy)
{
    const struct nsn_log_entry *entry = &copy->entry;
    struct nsn_target target = {entry->slot, entry->generation, entry->sid};
    if (entry->op == NSN_LOG_ADD) {
        if (!nsn_pattern_valid(copy->strings, entry->pattern_length))
            return -EPROTO;
        return hold(writer, target, copy->strings, entry->pattern_length, copy->strings + entry->pattern_length,
                    entry->queue_length);
    }
    if (entry->op == NSN_LOG_REMOVE) {
        struct nsn_targets_entry *held = nsn_targets_find(&writer->targets, target);
        if (!held)
            return -EPROTO;
        let_go(writer, held);
        return 0;
    }
    struct nsn_targets_session *session = nsn_targets_session(&writer->targets, entry->slot, entry->generation);
    if (!session)
        return -EPROTO;
    let_session_go(writer, session);
    return 0;
}

/* Reads the table back from the file; what was written but not committed when its nsnd died never happened. */
static int restore_entries(struct nsn_log_writer *writer, uint64_t number)
{
    struct file *file = &writer->file;
    struct nsn_log_copy copy;
    if (number > file->size - NSN_LOG_HEADER_SIZE)
        return -EPROTO;
    while (file->written != number) {
        int result = nsn_log_copy_entry(file->header, file->written, number, &copy);
        if (!result)
            result = restore_entry(writer, &copy);
        if (result)
            return result == -ENOMEM ? result : -EPROTO;
        file->written += copy.entry.length;
        file->count++;
    }
    file->committed = number;
    /* what it had, it has: this takes no memory unless the other nsnd died between two steps */
    return allocate(file, file->written + live_count(writer) * REMOVAL);
}

static int restore(struct nsn_log_writer *writer, char *error, size_t error_size)
{
    struct file *file = &writer->file;
    unsigned long long generation = file->generation, written;
    uint64_t number = nsn_load_acquire(&file->header->number); /* stored by an nsnd before this one */
    int result = restore_entries(writer, number);
    written = file->written;
    if (result == -EPROTO)
        return nsn_explain(error, error_size, result,
                           "log.%llu is broken behind byte %llu: end the programs that use this application ID and remove its "
                           "directory", generation, written);
    return result ? nsn_explain(error, error_size, result, "log.%llu cannot be carried on: %s", generation, strerror(-result)) : 0;
}

static int open_existing(struct nsn_log_writer *writer, char *error, size_t error_size)
{
    struct file *file = &writer->file;
    char name[NSN_LOG_NAME_SIZE];
    struct stat status;
    nsn_log_name(name, file->generation);
    file->fd = openat(writer->directory_fd, name, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    if (file->fd < 0 || fstat(file->fd, &status))
        return nsn_explain(error, error_size, -errno, "%s cannot be opened: %s", name, strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size < NSN_LOG_HEADER_SIZE)
        return nsn_explain(error, error_size, -EPROTO, "%s is not an interest log: remove it", name);
    if (status.st_uid != geteuid())
        return nsn_explain(error, error_size, -EACCES, "%s belongs to uid %u, not to this nsnd's %u: remove it", name,
                           status.st_uid, geteuid());
    file->size = (uint64_t)status.st_size;
    int result = map(file);
    if (result)
        return nsn_explain(error, error_size, result, "%s cannot be mapped: %s", name, strerror(-result));
    struct nsn_log_header copy;
    memcpy(&copy, file->header, offsetof(struct nsn_log_header, number));
    file->base = copy.base;
    return nsn_log_check_header(&copy, &status, file->generation, error, error_size);
}

/* Files of lower generations are left when an nsnd died in the middle of a move. */
static void retire_older(struct nsn_log_writer *writer)
{
    uint64_t generation;
    char name[NSN_LOG_NAME_SIZE];
    while (nsn_log_highest(writer->directory_fd, writer->file.generation, &generation) == 0) {
        struct stat status;
        nsn_log_name(name, generation);
        int fd = openat(writer->directory_fd, name, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
        bool whole = fd >= 0 && fstat(fd, &status) == 0 && status.st_size >= NSN_LOG_HEADER_SIZE;
        void *header = whole ? mmap(NULL, NSN_LOG_HEADER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
        if (header != MAP_FAILED) {
            retire(writer, header, generation);
            munmap(header, NSN_LOG_HEADER_SIZE);
        }
        if (fd >= 0)
            close(fd);
        if (unlinkat(writer->directory_fd, name, 0) && errno != ENOENT)
            return; /* it would be found for ever; as an older generation it does no harm */
    }
}

static int start(struct nsn_log_writer *writer, const char *directory, char *error, size_t error_size)
{
    if (nsn_targets_init(&writer->targets))
        return nsn_explain(error, error_size, -ENOMEM, "no memory for the interest of %s", directory);
    writer->directory_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (writer->directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    int result = nsn_log_highest(writer->directory_fd, UINT64_MAX, &writer->file.generation);
    if (result == -ENOENT) {
        writer->file.generation = 0;
        result = move(writer, 0);
        if (result)
            nsn_explain(error, error_size, result, "no interest log can be made in %s: %s", directory, strerror(-result));
        return result;
    }
    if (result)
        return nsn_explain(error, error_size, result, "%s: %s", directory, strerror(-result));
    unlinkat(writer->directory_fd, TEMPORARY, 0);
    result = open_existing(writer, error, error_size);
    if (!result)
        result = restore(writer, error, error_size);
    if (!result)
        retire_older(writer);
    return result;
}

int nsn_log_writer_open(struct nsn_log_writer **out, const char *directory, size_t initial_size, char *error, size_t error_size)
{
    struct nsn_log_writer *writer = calloc(1, sizeof(*writer));
    if (!writer)
        return nsn_explain(error, error_size, -ENOMEM, "no memory for the interest of %s", directory);
    writer->file.fd = writer->directory_fd = -1;
    writer->first_size = initial_size ? round_up(initial_size, NSN_LOG_HEADER_SIZE) : SIZE_DEFAULT;
    int result = start(writer, directory, error, error_size);
    if (result) {
        nsn_log_writer_close(writer);
        return result;
    }
    *out = writer;
    return 0;
}

void nsn_log_writer_close(struct nsn_log_writer *writer)
{
    if (!writer)
        return;
    size_t bucket = 0;
    struct nsn_targets_entry *entry;
    while (writer->targets.sessions.buckets && (entry = nsn_targets_any(&writer->targets, &bucket)))
        let_go(writer, entry);
    nsn_targets_free(&writer->targets);
    close_file(&writer->file);
    if (writer->directory_fd >= 0)
        close(writer->directory_fd);
    free(writer);
}
