/* nsnd's side of the interest log: the table of live subscriptions, and the file that tells the sessions of it. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nsn_error.h"
#include "nsn_log_file.h"
#include "nsn_log_output.h"
#include "nsn_protocol.h"
#include "nsn_shared.h"
#include "nsn_targets.h"

#define SIZE_DEFAULT (1u << 20)
#define SIZE_STEP 4096
#define DEAD_MOST (1u << 18)      /* bytes of dead entries that a session which connects may have to read in vain */
#define REMOVAL sizeof(struct nsn_log_entry)
#define TEMPORARY "log.new"

struct record { /* a live subscription, as it will stand in the next snapshot */
    struct nsn_targets_entry entry;
    uint16_t pattern_length, queue_length;
    char strings[];
};

struct nsn_log_writer {
    int directory_fd;
    uint64_t *head; /* in shared memory */
    struct nsn_log_output *file;
    uint64_t first_size;
    uint64_t live_bytes; /* of the entries that made what is alive */
    uint64_t move_again; /* a move that failed is not tried again before this many bytes are written */
    struct nsn_targets targets;
};

static uint64_t live_count(const struct nsn_log_writer *writer) { return writer->targets.entries.count; }

/* --- files -------------------------------------------------------------------------------------------------------- */

static void commit_file(struct nsn_log_writer *writer, struct nsn_log_output *file)
{
    /* pairs with the acquire loads in nsn_log_reader.c: whoever sees it finds the entries in the file */
    nsn_store_release(writer->head, file->generation << NSN_LOG_COMMITTED_BITS | file->written);
    file->committed = file->written;
}

static int publish_name(struct nsn_log_writer *writer, const struct nsn_log_output *file)
{
    char name[NSN_LOG_NAME_SIZE];
    nsn_log_name(name, file->generation);
    return renameat(writer->directory_fd, TEMPORARY, writer->directory_fd, name) ? -errno : 0;
}

static void remove_file(struct nsn_log_writer *writer, uint64_t generation)
{
    char name[NSN_LOG_NAME_SIZE];
    nsn_log_name(name, generation);
    unlinkat(writer->directory_fd, name, 0);
}

/* --- moving ------------------------------------------------------------------------------------------------------- */

static void write_snapshot(const struct nsn_log_writer *writer, struct nsn_log_output *file)
{
    const struct nsn_table *table = &writer->targets.entries;
    for (size_t bucket = 0; bucket <= table->mask; bucket++)
        for (struct nsn_item *item = table->buckets[bucket]; item; item = item->next) {
            struct record *record = nsn_container_of(item, struct record, entry.item);
            nsn_log_output_write(file, NSN_LOG_ADD, record->entry.target, record->strings, record->pattern_length,
                                 record->strings + record->pattern_length, record->queue_length);
        }
}

/* What the entries alive take, with room for their removals and `extra` bytes. */
static uint64_t needed_with(const struct nsn_log_writer *writer, uint64_t extra)
{
    return writer->live_bytes + live_count(writer) * REMOVAL + extra;
}

static int fill(struct nsn_log_writer *writer, struct nsn_log_output *fresh, uint64_t needed)
{
    int result = nsn_log_output_create(fresh, writer->directory_fd, TEMPORARY, needed);
    if (result)
        return result;
    write_snapshot(writer, fresh);
    result = nsn_log_output_finish(fresh);
    return result ? result : publish_name(writer, fresh);
}

/* Goes over to a new file, which holds what is alive, what was not committed yet included. On failure nothing changed. */
static int move(struct nsn_log_writer *writer, uint64_t extra)
{
    struct nsn_log_output *old = writer->file, *fresh = nsn_log_output_new(old ? old->generation + 1 : 1);
    uint64_t needed = needed_with(writer, extra), size = nsn_round_up(NSN_LOG_HEADER_SIZE + 2 * needed, SIZE_STEP);
    if (!fresh)
        return -ENOMEM;
    fresh->base = old ? old->base + old->count - live_count(writer) : 0;
    fresh->size = size < writer->first_size ? writer->first_size : size;
    int result = fill(writer, fresh, needed);
    if (result) {
        unlinkat(writer->directory_fd, TEMPORARY, 0);
        nsn_log_output_free(fresh);
        return result;
    }
    commit_file(writer, fresh); /* sends the readers of the old file on */
    if (old)
        remove_file(writer, old->generation);
    nsn_log_output_free(old);
    writer->file = fresh;
    writer->move_again = 0;
    return 0;
}

/* 0; or what the file system said when the file was of no use any more, and no other could be made: then nothing is
 * committed. */
static int commit(struct nsn_log_writer *writer)
{
    struct nsn_log_output *file = writer->file;
    if (file->committed != file->written) {
        int failed = nsn_log_output_finish(file);
        if (failed || file->nameless) {
            int result = move(writer, 0);
            if (!result || failed)
                return result;
        } /* one that has only lost its name is read by those who have it open */
        commit_file(writer, file);
    }
    uint64_t dead = file->written - writer->live_bytes;
    if (dead <= DEAD_MOST || dead <= 2 * writer->live_bytes || file->written < writer->move_again)
        return 0;
    /* a snapshot is for those who will connect; when there is no room for one the log goes on without */
    if (move(writer, 0))
        writer->move_again = file->written + DEAD_MOST;
    return 0;
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
    uint64_t end = writer->file->written + length + (live_count(writer) + 1) * REMOVAL;
    if (end > writer->file->size - NSN_LOG_HEADER_SIZE)
        return move(writer, length + REMOVAL);
    return nsn_log_output_allocate(writer->file, end);
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
        nsn_log_output_write(writer->file, NSN_LOG_ADD, target, pattern, pattern_length, queue, queue_length);
    return result;
}

static int drop(struct nsn_log_writer *writer, struct nsn_target target)
{
    struct nsn_targets_entry *entry = nsn_targets_find(&writer->targets, target);
    if (!entry)
        return -ENOENT;
    let_go(writer, entry);
    nsn_log_output_write(writer->file, NSN_LOG_REMOVE, target, NULL, 0, NULL, 0);
    return 0;
}

/* --- public changes ------------------------------------------------------------------------------------------------ */

int nsn_log_writer_add(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length)
{
    int result = add(writer, target, pattern, pattern_length, queue, queue_length), committed = commit(writer);
    return committed ? committed : result;
}

int nsn_log_writer_remove(struct nsn_log_writer *writer, struct nsn_target target)
{
    int result = drop(writer, target), committed = commit(writer);
    return committed ? committed : result;
}

int nsn_log_writer_session_gone(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation)
{
    struct nsn_targets_session *session = nsn_targets_session(&writer->targets, slot, generation);
    if (!session)
        return commit(writer);
    size_t count = let_session_go(writer, session);
    nsn_log_output_write(writer->file, NSN_LOG_SESSION_GONE, (struct nsn_target){slot, generation, 0}, NULL, 0, NULL, 0);
    int committed = commit(writer);
    return committed ? committed : (int)count;
}

/* The change at *at of a batch, and the place of the next one. 0, or -EBADMSG. */
static int next_change(const uint8_t *batch, size_t length, size_t *at, struct nsn_interest_change *change,
                       const char **strings)
{
    if (length - *at < sizeof(*change))
        return -EBADMSG;
    memcpy(change, batch + *at, sizeof(*change));
    size_t whole = nsn_round_up(sizeof(*change) + change->pattern_length + change->queue_length, 8);
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
    int committed = commit(writer);
    if (committed)
        *failed = NSN_LOG_NOTHING_COMMITTED;
    return committed ? committed : result;
}

/* --- looking in ---------------------------------------------------------------------------------------------------- */

uint64_t nsn_log_writer_number(const struct nsn_log_writer *writer) { return writer->file->base + writer->file->count; }

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

static int restore_entry(void *context, const struct nsn_log_entry *entry, const char *strings)
{
    struct nsn_log_writer *writer = context;
    struct nsn_target target = {entry->slot, entry->generation, entry->sid};
    writer->file->count++;
    if (entry->op == NSN_LOG_ADD) {
        if (!nsn_pattern_valid(strings, entry->pattern_length))
            return -EPROTO;
        int result = hold(writer, target, strings, entry->pattern_length, strings + entry->pattern_length, entry->queue_length);
        return result == -EEXIST ? -EPROTO : result;
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
static int restore(struct nsn_log_writer *writer, uint64_t committed, char *error, size_t error_size)
{
    struct nsn_log_output *file = writer->file;
    unsigned long long generation = file->generation;
    int result = nsn_log_read(file->fd, &file->written, committed, restore_entry, writer);
    file->committed = file->written;
    if (result == -EPROTO)
        return nsn_explain(error, error_size, result,
                           "log.%llu is broken, or was cut, behind byte %llu: end the programs that use this application ID "
                           "and remove its directory", generation, (unsigned long long)file->written);
    if (!result) /* what it had, it has: this takes no memory unless the other nsnd died between two steps */
        result = nsn_log_output_allocate(file, file->written + live_count(writer) * REMOVAL);
    return result ? nsn_explain(error, error_size, result, "log.%llu cannot be carried on: %s", generation,
                                strerror(-result)) : 0;
}

static int open_existing(struct nsn_log_writer *writer, char *error, size_t error_size)
{
    struct nsn_log_output *file = writer->file;
    struct nsn_log_header header;
    struct stat status;
    char name[NSN_LOG_NAME_SIZE];
    nsn_log_name(name, file->generation);
    file->fd = nsn_log_open(writer->directory_fd, name, file->generation, O_RDWR, &header, error, error_size);
    if (file->fd < 0)
        return file->fd;
    if (fstat(file->fd, &status))
        return nsn_explain(error, error_size, -errno, "%s: %s", name, strerror(errno));
    if (status.st_uid != geteuid())
        return nsn_explain(error, error_size, -EACCES, "%s belongs to uid %u, not to this nsnd's %u: remove it", name,
                           status.st_uid, geteuid());
    file->size = (uint64_t)status.st_size;
    file->base = header.base;
    return 0;
}

static bool is_log(const char *name, uint64_t *generation)
{
    if (strncmp(name, "log.", 4) != 0 || name[4] < '1' || name[4] > '9' || strlen(name) > 23)
        return false;
    char *end;
    *generation = strtoull(name + 4, &end, 10);
    return *end == '\0';
}

/* Of an nsnd that died in the middle of a move, or of a log whose last reader has gone. What cannot be removed does no harm. */
static void remove_others(struct nsn_log_writer *writer)
{
    int fd = openat(writer->directory_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* a listing position of its own */
    DIR *listing = fd < 0 ? NULL : fdopendir(fd);
    if (!listing) {
        if (fd >= 0)
            close(fd);
        return;
    }
    uint64_t generation;
    for (struct dirent *entry; (entry = readdir(listing));)
        if (is_log(entry->d_name, &generation) && generation != writer->file->generation)
            remove_file(writer, generation);
    closedir(listing);
    unlinkat(writer->directory_fd, TEMPORARY, 0);
}

static int start(struct nsn_log_writer *writer, const char *directory, char *error, size_t error_size)
{
    uint64_t head = nsn_load_acquire(writer->head); /* stored by an nsnd before this one */
    if (nsn_targets_init(&writer->targets))
        return nsn_explain(error, error_size, -ENOMEM, "no memory for the interest of %s", directory);
    writer->directory_fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (writer->directory_fd < 0)
        return nsn_explain(error, error_size, -errno, "%s: %s", directory, strerror(errno));
    int result;
    if (!head) {
        result = move(writer, 0);
        if (result)
            nsn_explain(error, error_size, result, "no interest log can be made in %s: %s", directory, strerror(-result));
    } else {
        writer->file = nsn_log_output_new(nsn_log_generation(head));
        if (!writer->file)
            return nsn_explain(error, error_size, -ENOMEM, "no memory for the interest of %s", directory);
        result = open_existing(writer, error, error_size);
        if (!result)
            result = restore(writer, nsn_log_committed(head), error, error_size);
    }
    if (!result)
        remove_others(writer);
    return result;
}

int nsn_log_writer_open(struct nsn_log_writer **out, const char *directory, uint64_t *head, size_t initial_size, char *error,
                        size_t error_size)
{
    struct nsn_log_writer *writer = calloc(1, sizeof(*writer));
    if (!writer)
        return nsn_explain(error, error_size, -ENOMEM, "no memory for the interest of %s", directory);
    writer->directory_fd = -1;
    writer->head = head;
    writer->first_size = initial_size ? nsn_round_up(initial_size, SIZE_STEP) : SIZE_DEFAULT;
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
    nsn_log_output_free(writer->file);
    if (writer->directory_fd >= 0)
        close(writer->directory_fd);
    free(writer);
}
