/* The consumer's end of a link: every byte and word of the producer is copied once, checked, and the copy used.
 *
 * No loop here is longer than what lies in one record, whatever the producer writes: a chunk may be skipped once before a
 * record, and positions are bounded by the size of the link. After something impossible the link is broken for good. */
#include "nsn_link_layout.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nsn_memfd.h"

#define CHUNK_WORDS (NSN_LINK_CHUNKS / 64)
#define LOW_CHUNKS ((1ull << NSN_LINK_KEEP) - 1)
#define TRIM_WORTH 16384u /* bytes of the current chunk for which alone a trim does not pay */
#define SUBJECT_MAX 4096u
#define PREFETCHED 2u     /* cache lines: a small record */

struct nsn_link_in {
    struct nsn_link_file *file;
    uint64_t head;                 /* own position; the published one may be behind */
    uint64_t tail;                 /* the producer's, as last read and found possible */
    uint64_t consumed;             /* record and pool bytes */
    const uint8_t *chunk;          /* of the head, when open */
    uint16_t physical;
    bool open;
    bool changed;                  /* something to publish, or released since */
    bool broken;
    uint32_t peeked;               /* length of the record peeked last, 0: none */
    uint64_t peeked_pool;          /* its bytes in the pool */
    bool peeked_ref;               /* it carries a pool reference */

    uint64_t link_id, segments;
    uint64_t published;
    uint64_t left[CHUNK_WORDS];    /* physical chunks that were read to the end and whose memory was not given back since */
    uint32_t left_high;            /* how many of them from NSN_LINK_KEEP on */
    uint64_t received, released;   /* pool references, in the link's life */
    uint16_t highest;              /* highest chunk read since the last trim */
    uint32_t highest_ref;          /* highest index released since the pages of that table were last given back */

    uint64_t rung;                 /* the want number that was answered last */
    uint64_t stall, stall_acknowledged, dropped;

    uint64_t trim, trimmed;
    uint64_t trim_head;            /* where the trim that is going on began */
    uint64_t trimmed_at;           /* where the last one was */
    size_t page;                   /* bytes of the machine's pages */
    bool owns_mapping;
};

static int broken(struct nsn_link_in *link)
{
    link->broken = true;
    return -EPROTO;
}

/* --- life -------------------------------------------------------------------------------------------------------- */

int nsn_link_in_adopt(struct nsn_link_in **result, struct nsn_link_file *file, uint64_t link_id, char *error, size_t error_size)
{
    const struct nsn_link_producer_words *words = &file->producer;
    uint64_t magic = nsn_load_acquire(&words->magic), id = nsn_load_relaxed(&words->link_id);
    uint32_t version = nsn_load_relaxed32(&words->version), chunks = nsn_load_relaxed32(&words->chunks);
    if (magic != NSN_LINK_MAGIC || version != NSN_LINK_VERSION || chunks != NSN_LINK_CHUNKS || id != link_id) {
        snprintf(error, error_size, "link %llu is not what it should be: magic %llx, version %u (ours is %u), %u chunks, "
                 "named %llu",
                 (unsigned long long)link_id, (unsigned long long)magic, version, NSN_LINK_VERSION, chunks,
                 (unsigned long long)id);
        return -EPROTO;
    }
    struct nsn_link_in *link = calloc(1, sizeof *link);
    if (!link) {
        snprintf(error, error_size, "out of memory for a link");
        return -ENOMEM;
    }
    link->file = file;
    link->link_id = link_id;
    link->page = (size_t)sysconf(_SC_PAGESIZE);
    nsn_store_release(&file->consumer.taken, 1); /* with nsn_link_out_taken, which reads nothing else */
    *result = link;
    return 0;
}

void nsn_link_in_took_segment(struct nsn_link_in *link)
{
    nsn_store_release(&link->file->consumer.taken, 1 + ++link->segments); /* as above */
}

int nsn_link_in_map(struct nsn_link_in **result, int fd, uint64_t link_id, char *error, size_t error_size)
{
    struct nsn_link_file *file;
    int code = nsn_memfd_check(fd, "the link", sizeof *file, NSN_LINK_SEALS, NSN_LINK_NO_SEALS, error, error_size);
    if (code < 0)
        return code;
    file = nsn_memfd_map(fd, sizeof *file, PROT_READ | PROT_WRITE, error, error_size);
    if (!file)
        return -errno;
    code = nsn_link_in_adopt(result, file, link_id, error, error_size);
    if (code < 0)
        munmap(file, sizeof *file);
    else
        (*result)->owns_mapping = true;
    return code;
}

void nsn_link_in_resume(struct nsn_link_in *link, uint64_t head, uint64_t consumed)
{
    link->head = link->tail = link->published = head;
    link->consumed = consumed;
}

void nsn_link_in_destroy(struct nsn_link_in *link)
{
    if (!link)
        return;
    if (link->owns_mapping)
        munmap(link->file, sizeof(struct nsn_link_file));
    free(link);
}

/* --- position ------------------------------------------------------------------------------------------------------ */

static int load_tail(struct nsn_link_in *link)
{
    uint64_t tail = nsn_load_acquire(&link->file->producer.tail); /* pairs with nsn_link_out_commit: the record is whole */
    if (link->broken || tail < link->tail || tail % 8 || tail - link->head > (uint64_t)NSN_LINK_CHUNKS * NSN_LINK_CHUNK)
        return broken(link);
    link->tail = tail;
    return 0;
}

void nsn_link_in_prefetch(const struct nsn_link_in *link)
{
    __builtin_prefetch(&link->file->producer.tail);
    const uint8_t *next = link->open ? link->chunk + nsn_link_offset_of(link->head) : NULL;
    for (uint32_t line = 0; next && line < PREFETCHED; line++)
        __builtin_prefetch(next + line * NSN_CACHE_LINE);
}

static int open_chunk(struct nsn_link_in *link)
{
    const uint16_t *entry = &link->file->producer.map[nsn_link_chunk_of(link->head) % NSN_LINK_CHUNKS];
    uint16_t physical = __atomic_load_n(entry, __ATOMIC_RELAXED); /* written before the tail that was loaded with acquire */
    if (physical >= NSN_LINK_CHUNKS)
        return broken(link);
    link->physical = physical;
    link->chunk = link->file->chunk[physical];
    link->open = true;
    link->highest = physical > link->highest ? physical : link->highest;
    if (physical < NSN_LINK_KEEP) /* in use again: of the current chunk a trim keeps the head's page */
        link->left[0] &= ~(1ull << physical);
    return 0;
}

/* The head has reached, or moves to, the start of the next chunk. */
static void leave_chunk(struct nsn_link_in *link, uint64_t next)
{
    uint64_t bit = 1ull << (link->physical % 64);
    link->left_high += link->physical >= NSN_LINK_KEEP && !(link->left[link->physical / 64] & bit);
    link->left[link->physical / 64] |= bit;
    link->open = false;
    link->head = next;
    link->changed = true;
}

/* Where the next record lies and its length: 1, 0 when empty, -EPROTO. */
static int next_record(struct nsn_link_in *link, const uint8_t **at, uint32_t *length)
{
    if (link->broken || (link->head == link->tail && load_tail(link) < 0))
        return -EPROTO;
    if (link->head == link->tail)
        return 0;
    if (!link->open && open_chunk(link) < 0)
        return -EPROTO;
    uint32_t offset = nsn_link_offset_of(link->head);
    uint32_t size = nsn_load_relaxed32((const uint32_t *)(const void *)(link->chunk + offset));
    if (size == NSN_RECORD_SKIP) { /* becomes visible only together with a record in the next chunk, and is never first */
        uint64_t next = (nsn_link_chunk_of(link->head) + 1) * NSN_LINK_CHUNK;
        if (offset == 0 || link->tail <= next)
            return broken(link);
        leave_chunk(link, next);
        if (open_chunk(link) < 0)
            return -EPROTO;
        offset = 0;
        size = nsn_load_relaxed32((const uint32_t *)(const void *)link->chunk);
    }
    if (size % 8 || size < sizeof(struct nsn_record) || size > NSN_RECORD_MAX || size > NSN_LINK_CHUNK - offset ||
        size > link->tail - link->head)
        return broken(link);
    *at = link->chunk + offset;
    *length = size;
    return 1;
}

bool nsn_link_in_empty(struct nsn_link_in *link)
{
    if (link->head == link->tail && load_tail(link) < 0)
        return false; /* so that the caller peeks and learns that it is broken */
    return link->head == link->tail && !link->broken;
}

int nsn_link_in_end(struct nsn_link_in *link, uint64_t *end)
{
    int result = load_tail(link);
    *end = link->tail;
    return result;
}

uint64_t nsn_link_in_tail(struct nsn_link_in *link)
{
    load_tail(link); /* when impossible: the last that was not, and the next peek says -EPROTO */
    return link->tail;
}

uint64_t nsn_link_in_head(const struct nsn_link_in *link) { return link->head; }
uint64_t nsn_link_in_behind(struct nsn_link_in *link) { return nsn_link_in_tail(link) - link->head; }
uint64_t nsn_link_in_id(const struct nsn_link_in *link) { return link->link_id; }

/* --- reading ------------------------------------------------------------------------------------------------------- */

/* From here on the copy is what counts: the compiler may not read the producer's bytes a second time in its place. */
static inline void copied(void) { __asm__ volatile("" ::: "memory"); }

static bool is_possible(const struct nsn_record *record)
{
    bool pool = record->flags & NSN_RECORD_POOL, parts = record->flags & NSN_RECORD_PARTS;
    uint64_t most = pool || parts ? 72ull << 20 : NSN_RECORD_MAX; /* NSN_BLOCK_MAX */
    if (parts && (pool || record->kind != NSN_RECORD_MESSAGE))
        return false;
    if (record->payload_length > most || record->header_length > most - record->payload_length)
        return false;
    if (record->kind == NSN_RECORD_MESSAGE)
        return record->sid_count >= 1 && record->sid_count <= NSN_RECORD_SIDS && record->subject_length >= 1 &&
               record->subject_length <= SUBJECT_MAX && record->reply_length <= SUBJECT_MAX;
    if (record->sid_count || record->subject_length || record->reply_length || record->header_length)
        return false;
    return pool ? record->kind == NSN_RECORD_SEGMENT_GONE && record->payload_length == 0
                : record->kind == NSN_RECORD_PART && record->payload_length > 0;
}

/* A message's reference names one of our words; that of SEGMENT_GONE is none and has only the segment. */
static bool is_possible_ref(const struct nsn_pool_ref *ref, uint8_t kind)
{
    if (kind == NSN_RECORD_SEGMENT_GONE)
        return ref->use == 0;
    return ref->use != 0 && ref->ref < NSN_LINK_REFS && ref->offset <= (uint64_t)INT64_MAX;
}

int nsn_link_in_peek(struct nsn_link_in *link, struct nsn_record_view *view, uint64_t limit_stamp)
{
    const uint8_t *at;
    uint32_t length;
    link->peeked = 0;
    int code = next_record(link, &at, &length);
    if (code <= 0)
        return code;
    struct nsn_record *record = &view->record;
    memcpy(record, at, sizeof *record);
    copied();
    if (record->length != length || !is_possible(record))
        return broken(link);
    if (record->stamp > limit_stamp)
        return 0;
    bool pool = record->flags & NSN_RECORD_POOL, elsewhere = record->flags & (NSN_RECORD_POOL | NSN_RECORD_PARTS);
    uint32_t sid_bytes = record->sid_count * 4u;
    uint64_t offset = sizeof *record + (sid_bytes + 7) / 8 * 8;
    uint64_t inside = elsewhere ? 0 : record->header_length + record->payload_length;
    if (offset + (pool ? sizeof view->pool_ref : 0) + record->subject_length + record->reply_length + inside > length)
        return broken(link);
    if (sid_bytes == sizeof view->sids[0]) /* mostly: and no call */
        memcpy(view->sids, at + sizeof *record, sizeof view->sids[0]);
    else
        memcpy(view->sids, at + sizeof *record, sid_bytes);
    if (pool) {
        memcpy(&view->pool_ref, at + offset, sizeof view->pool_ref);
        offset += sizeof view->pool_ref;
    }
    copied();
    if (pool && !is_possible_ref(&view->pool_ref, record->kind))
        return broken(link);
    view->subject = (const char *)at + offset;
    view->reply = view->subject + record->subject_length;
    view->headers = elsewhere ? NULL : (const uint8_t *)view->reply + record->reply_length;
    view->payload = elsewhere ? NULL : view->headers + record->header_length;
    link->peeked = length;
    link->peeked_ref = pool && record->kind == NSN_RECORD_MESSAGE;
    link->peeked_pool = pool ? record->header_length + record->payload_length : 0;
    return 1;
}

int nsn_link_in_stamp(struct nsn_link_in *link, uint64_t *stamp)
{
    const uint8_t *at;
    uint32_t length;
    int code = next_record(link, &at, &length);
    if (code == 1)
        *stamp = nsn_load_relaxed(&((const struct nsn_record *)(const void *)at)->stamp);
    return code;
}

void nsn_link_in_consume(struct nsn_link_in *link)
{
    assert(link->peeked);
    uint64_t next = link->head + link->peeked;
    link->consumed += link->peeked + link->peeked_pool;
    link->received += link->peeked_ref;
    link->peeked = 0;
    link->changed = true;
    if (nsn_link_offset_of(next) == 0)
        leave_chunk(link, next);
    else
        link->head = next;
}

int nsn_link_in_parts(struct nsn_link_in *link, const struct nsn_record_view *view, uint8_t *bytes)
{
    struct nsn_record_view part;
    uint64_t left = view->record.header_length + view->record.payload_length;
    if (left == 0 || left > link->tail - link->head) /* they become visible together with the record that announces them */
        return broken(link);
    while (left) {
        nsn_link_in_consume(link);
        int code = link->head == link->tail ? -EPROTO : nsn_link_in_peek(link, &part, UINT64_MAX);
        if (code != 1 || part.record.kind != NSN_RECORD_PART || part.record.payload_length > left)
            return broken(link);
        if (bytes) {
            memcpy(bytes, part.payload, part.record.payload_length);
            bytes += part.record.payload_length;
        }
        left -= part.record.payload_length;
    }
    return 1;
}

void nsn_link_in_release(struct nsn_link_in *link, uint32_t ref, uint32_t use)
{
    assert(ref < NSN_LINK_REFS);
    nsn_store_release32(&link->file->consumer.released[ref], use); /* pairs with is_released in nsn_link_out.c */
    link->released++;
    link->changed = true;
    if (ref > link->highest_ref)
        link->highest_ref = ref;
}

/* --- giving memory back -------------------------------------------------------------------------------------------- */

/* Whole pages. A kernel that refuses costs memory, nothing else: the caller's figure says so. */
static size_t give_back(struct nsn_link_in *link, void *start, size_t length)
{
    if (!length || (uintptr_t)start % link->page || length % link->page)
        return 0;
    return madvise(start, length, MADV_REMOVE) == 0 ? length : 0;
}

static uint32_t next_left(const struct nsn_link_in *link, uint32_t chunk)
{
    while (chunk < NSN_LINK_CHUNKS) {
        uint64_t bits = link->left[chunk / 64] >> (chunk % 64);
        if (bits)
            return chunk + (uint32_t)__builtin_ctzll(bits);
        chunk = (chunk / 64 + 1) * 64;
    }
    return chunk;
}

/* Gives back the chunks in `left` that lie in [from, to), neighbours together. */
static size_t give_back_left(struct nsn_link_in *link, uint32_t from, uint32_t to)
{
    size_t bytes = 0;
    uint32_t start, end;
    for (start = next_left(link, from); start < to; start = next_left(link, end)) {
        for (end = start; end < to && (link->left[end / 64] >> (end % 64) & 1); end++)
            link->left[end / 64] &= ~(1ull << (end % 64));
        bytes += give_back(link, link->file->chunk[start], (size_t)(end - start) * NSN_LINK_CHUNK);
    }
    return bytes;
}

/* Of the chunk in which the head stands only the page of the head stays: the next record begins there, or the mark that
 * the chunk is skipped. */
static size_t give_back_current(struct nsn_link_in *link)
{
    if (!link->open)
        return 0;
    uint8_t *chunk = link->file->chunk[link->physical];
    size_t kept = nsn_link_offset_of(link->head) / link->page * link->page, behind = kept + link->page;
    size_t bytes = give_back(link, chunk, kept);
    return bytes + (behind < NSN_LINK_CHUNK ? give_back(link, chunk + behind, NSN_LINK_CHUNK - behind) : 0);
}

static bool refs_worth(const struct nsn_link_in *link)
{
    size_t first = offsetof(struct nsn_link_consumer_words, released) + link->highest_ref * sizeof(uint32_t);
    return first >= link->page && link->received == link->released;
}

/* The words say "released" until the producer has read them: only when it has read all of them may they become 0. */
static size_t give_back_refs(struct nsn_link_in *link)
{
    /* pairs with the release in nsn_link_out_reap */
    if (!refs_worth(link) || nsn_load_acquire(&link->file->producer.reaped) != link->released)
        return 0;
    uint8_t *words = (uint8_t *)&link->file->consumer;
    uintptr_t start = ((uintptr_t)words + 4096 + link->page - 1) / link->page * link->page;
    uintptr_t end = ((uintptr_t)words + sizeof link->file->consumer) / link->page * link->page;
    link->highest_ref = 0;
    return end > start ? give_back(link, (void *)start, end - start) : 0;
}

bool nsn_link_in_trim_begin(struct nsn_link_in *link)
{
    if (link->trim & 1)
        return true;
    if (link->published != link->head || !nsn_link_in_empty(link))
        return false;
    uint64_t since = link->head - link->trimmed_at;
    bool same_chunk = nsn_link_chunk_of(link->head) == nsn_link_chunk_of(link->trimmed_at);
    if (!(link->left[0] & LOW_CHUNKS) && (!link->open || (same_chunk && since < TRIM_WORTH)) &&
        link->highest < NSN_LINK_TABLE_CHUNKS && !refs_worth(link))
        return false;
    link->trim_head = link->head;
    nsn_store_relaxed(&link->file->consumer.trim, ++link->trim);
    nsn_fence(); /* with the one at the start of every publish: either the producer reads the odd number or we see it inside */
    return true;
}

size_t nsn_link_in_trim_end(struct nsn_link_in *link, bool go)
{
    size_t bytes = 0;
    if (!(link->trim & 1))
        return 0;
    /* Still where it began: nothing was written before the producer knew, and what it writes now lies in chunks that are
     * not in `left`, or is the skip mark in the page that is kept. */
    if (go && link->head == link->trim_head && nsn_link_in_empty(link)) {
        bytes = give_back_left(link, 0, NSN_LINK_KEEP) + give_back_current(link) + give_back_refs(link);
        if (link->highest >= NSN_LINK_TABLE_CHUNKS)
            nsn_link_forget_tables(link->file);
        link->highest = 0;
        link->trimmed_at = link->head;
        nsn_store_relaxed(&link->file->consumer.trimmed, ++link->trimmed);
    }
    /* pairs with the acquire in nsn_link_out_room: the low chunks are given back, and may be written again */
    nsn_store_release(&link->file->consumer.trim, ++link->trim);
    return bytes;
}

/* --- publishing the position --------------------------------------------------------------------------------------- */

/* What the producer waits for. An empty link is room for anything that does not lack a reference. */
static bool is_there(struct nsn_link_in *link)
{
    const struct nsn_link_producer_words *words = &link->file->producer;
    bool consumed = link->consumed >= nsn_load_relaxed(&words->want_consumed);
    bool released = link->released >= nsn_load_relaxed(&words->want_released);
    if (nsn_load_relaxed(&words->want_either))
        return consumed || released;
    return (consumed && released) || (nsn_link_in_empty(link) && link->received - link->released < NSN_LINK_REFS);
}

int nsn_link_in_publish(struct nsn_link_in *link)
{
    if (!link->changed)
        return 0;
    link->changed = false;
    if (link->head != link->published) {
        if (link->left_high) { /* before the head frees them: afterwards they may hold records */
            nsn_store_release(&link->file->consumer.passed, link->head); /* pairs with nsn_link_out_reader */
            give_back_left(link, NSN_LINK_KEEP, NSN_LINK_CHUNKS);
            link->left_high = 0;
        }
        link->published = link->head;
        nsn_store_relaxed(&link->file->consumer.consumed, link->consumed);
        nsn_store_release(&link->file->consumer.head, link->head); /* pairs with refresh in nsn_link_out.c */
    }
    nsn_fence(); /* with the one in ask, nsn_link_out.c: either the producer sees the position or we see that it wants */
    uint64_t want = nsn_load_acquire(&link->file->producer.want);
    if (!(want & 1) || want == link->rung || !is_there(link))
        return 0;
    link->rung = want;
    return 1;
}

/* --- being given up ------------------------------------------------------------------------------------------------ */

uint64_t nsn_link_in_stalled(struct nsn_link_in *link)
{
    uint64_t stall = nsn_load_acquire(&link->file->producer.stall); /* pairs with nsn_link_out_stall: the tail is final */
    if (stall == link->stall_acknowledged)
        return 0;
    if (stall < link->stall_acknowledged || load_tail(link) < 0) {
        broken(link);
        return 0;
    }
    link->stall = stall;
    return link->tail;
}

static uint64_t new_drops(struct nsn_link_in *link)
{
    uint64_t now = nsn_load_relaxed(&link->file->producer.dropped), before = link->dropped;
    if (now <= before)
        return 0;
    link->dropped = now;
    return now - before;
}

uint64_t nsn_link_in_late_drops(struct nsn_link_in *link) { return new_drops(link); }

void nsn_link_in_acknowledge_stall(struct nsn_link_in *link, uint64_t *dropped)
{
    *dropped = 0;
    if (link->stall == link->stall_acknowledged)
        return;
    link->stall_acknowledged = link->stall;
    nsn_store_release(&link->file->consumer.stall_acknowledged, link->stall); /* pairs with nsn_link_out_stalled */
    /* Pairs with the producer's behind nsn_link_out_drop: a drop under way at this moment is seen here, or the producer sees
     * the answer and has us look again (nsn_link_in_late_drops). */
    nsn_fence();
    *dropped = new_drops(link);
}
