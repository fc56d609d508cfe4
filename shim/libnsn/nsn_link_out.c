/* The producer's end of a link: where records are written, and what is known of the consumer's progress.
 *
 * Nothing that this end wrote is ever read back. What the consumer wrote is only believed when it is possible; after an
 * impossible word the link is broken for good. */
#include "nsn_link_layout.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nsn_memfd.h"
#include "nsn_pool.h"

#define FREE_WORDS (NSN_LINK_CHUNKS / 64)
#define NO_REF UINT32_MAX
#define REAP_OLDEST 4u /* how many that are not released yet a quick reap looks at from the oldest on */
#define REAP_CURSOR 4u /* and how many further on, so that a few kept for long do not hide the rest */
#define PAGE 4096u
/* The shortest record with as many sids as go into one, a pool reference and a subject. */
#define FULL_RECORD ((uint32_t)(sizeof(struct nsn_record) + 4 * NSN_RECORD_SIDS + sizeof(struct nsn_pool_ref) + 8))

_Static_assert(NSN_LINK_CHUNKS % 64 == 0 && NSN_LINK_KEEP < 64, "the bitmap of free chunks has whole words");

struct ref {                       /* a pool reference; those that are out form a list, oldest first */
    struct nsn_block *block;
    uint64_t bytes;
    uint32_t use;
    uint32_t previous, next;
};

struct nsn_link_out {
    struct nsn_link_file *file;
    uint64_t tail;                 /* published */
    uint64_t position;             /* where the next record goes: the tail, or the start of the chunk that was begun for it */
    uint64_t limit;
    uint64_t sent;                 /* record and pool bytes committed */
    uint64_t head, consumed;       /* the consumer's, as last read and found possible */
    uint64_t trim;                 /* the consumer's trim number as seen by the last room() */
    uint64_t chunk_trim;           /* and when the current chunk was begun */
    uint8_t *chunk;                /* the current one; meaningless while the offset of `position` is 0 and it is not begun */
    bool begun;                    /* the chunk of `position` has memory */
    bool broken;
    uint32_t reserved;             /* length of the record being written, 0: none */
    uint64_t reserved_pool;        /* pool bytes of it */

    uint64_t link_id;
    uint64_t freed;                /* logical chunks below this one are free */
    uint64_t free_chunks[FREE_WORDS];
    uint32_t free_count;
    uint16_t map[NSN_LINK_CHUNKS]; /* as published */

    uint64_t want, stall, stall_acknowledged, dropped;

    uint32_t high_in_use;          /* chunks from NSN_LINK_KEEP on that are not free */
    uint32_t low_touched[NSN_LINK_KEEP]; /* bytes of the chunks below it that may occupy memory, the current one's aside */
    uint32_t touched_from;         /* what lies before this offset of the current chunk was given back */
    uint64_t trimmed;              /* the consumer's, as last read */
    uint16_t highest;              /* highest chunk begun since then */

    struct ref *refs;
    uint32_t free_ref_words[(NSN_LINK_REFS + 31) / 32];
    uint32_t ref_hint;             /* no free ref below this word of the bitmap */
    uint32_t oldest, newest, cursor;
    uint32_t out_count;
    uint64_t referred, reaped;     /* in the link's life */
    uint64_t pinned;
};

static int refresh(struct nsn_link_out *link);

/* --- life -------------------------------------------------------------------------------------------------------- */

static void set_up(struct nsn_link_out *link, uint64_t link_id, uint64_t limit)
{
    link->link_id = link_id;
    link->limit = limit && limit < NSN_LINK_LIMIT ? limit : NSN_LINK_LIMIT;
    memset(link->free_chunks, 0xff, sizeof link->free_chunks);
    link->free_count = NSN_LINK_CHUNKS;
    link->oldest = link->newest = link->cursor = NO_REF;
    for (uint32_t ref = 0; ref < NSN_LINK_REFS; ref++)
        link->free_ref_words[ref / 32] |= 1u << (ref % 32);

    struct nsn_link_producer_words *words = &link->file->producer;
    nsn_store_relaxed32(&words->version, NSN_LINK_VERSION);
    nsn_store_relaxed32(&words->chunks, NSN_LINK_CHUNKS);
    nsn_store_relaxed(&words->link_id, link_id);
    nsn_store_release(&words->magic, NSN_LINK_MAGIC); /* the descriptor is handed over later than this: nothing to pair with */
}

int nsn_link_out_create(struct nsn_link_out **result, uint64_t link_id, uint64_t limit, int *fd, char *error, size_t error_size)
{
    struct nsn_link_out *link = calloc(1, sizeof *link);
    if (link)
        link->refs = calloc(NSN_LINK_REFS, sizeof *link->refs); /* pages of it come with use */
    if (!link || !link->refs) {
        free(link);
        snprintf(error, error_size, "out of memory for a link");
        return -ENOMEM;
    }
    int code = nsn_memfd_create("nsn-link", sizeof(struct nsn_link_file), error, error_size);
    int memory = code;
    if (code >= 0) {
        link->file = nsn_memfd_map(memory, sizeof(struct nsn_link_file), PROT_READ | PROT_WRITE, error, error_size);
        code = link->file ? nsn_memfd_seal(memory, NSN_LINK_SEALS, error, error_size) : -errno;
    }
    if (code < 0) {
        if (link->file)
            munmap(link->file, sizeof(struct nsn_link_file));
        if (memory >= 0)
            close(memory);
        free(link->refs);
        free(link);
        return code;
    }
    set_up(link, link_id, limit);
    *fd = memory;
    *result = link;
    return 0;
}

void nsn_link_out_destroy(struct nsn_link_out *link, struct nsn_pool *pool)
{
    if (!link)
        return;
    uint64_t now_ns = link->out_count ? nsn_now_ns() : 0;
    for (uint32_t ref = link->oldest; ref != NO_REF; ref = link->refs[ref].next)
        nsn_block_drop(pool, link->refs[ref].block, now_ns);
    munmap(link->file, sizeof(struct nsn_link_file));
    free(link->refs);
    free(link);
}

struct nsn_link_file *nsn_link_out_file(struct nsn_link_out *link) { return link->file; }

int nsn_link_out_reader(struct nsn_link_out *link, struct nsn_link_in **reader, char *error, size_t error_size)
{
    if (refresh(link) < 0) {
        snprintf(error, error_size, "the consumer of link %llu left impossible positions", (unsigned long long)link->link_id);
        return -EPROTO;
    }
    /* It may have died between giving memory back and publishing its position. */
    uint64_t passed = nsn_load_acquire(&link->file->consumer.passed); /* pairs with nsn_link_in_publish */
    bool possible = passed > link->head && passed <= link->tail && passed % 8 == 0;
    int code = nsn_link_in_adopt(reader, link->file, link->link_id, error, error_size);
    if (code == 0)
        nsn_link_in_resume(*reader, possible ? passed : link->head, link->consumed);
    return code;
}

/* --- the consumer's words ------------------------------------------------------------------------------------------ */

static void free_chunk(struct nsn_link_out *link, uint16_t physical)
{
    link->free_chunks[physical / 64] |= 1ull << (physical % 64);
    link->free_count++;
    link->high_in_use -= physical >= NSN_LINK_KEEP;
}

/* Copies the consumer's position, checks it, frees the chunks behind it. */
static int refresh(struct nsn_link_out *link)
{
    if (link->broken)
        return -EPROTO;
    const struct nsn_link_consumer_words *words = &link->file->consumer;
    uint64_t head = nsn_load_acquire(&words->head); /* pairs with the store in nsn_link_in_publish: the chunks are read */
    uint64_t consumed = nsn_load_relaxed(&words->consumed); /* stored before the head: as new as it or newer */
    bool possible = head >= link->head && head <= link->tail && head % 8 == 0 && consumed >= link->consumed &&
                    consumed <= link->sent && (head != link->tail || consumed == link->sent);
    if (!possible) {
        link->broken = true;
        return -EPROTO;
    }
    link->head = head;
    link->consumed = consumed;
    for (; link->freed < nsn_link_chunk_of(head); link->freed++)
        free_chunk(link, link->map[link->freed % NSN_LINK_CHUNKS]);
    return 0;
}

/* Follows the consumer's trim number. What it gave back it did in an empty link, between two of our publishes. */
static void follow_trim(struct nsn_link_out *link)
{
    uint64_t trim = nsn_load_acquire(&link->file->consumer.trim); /* pairs with nsn_link_in_trim_end: all is given back */
    if (trim == link->trim)
        return;
    uint64_t trimmed = nsn_load_relaxed(&link->file->consumer.trimmed); /* stored before the even number */
    if (trimmed != link->trimmed) {
        link->trimmed = trimmed;
        memset(link->low_touched, 0, sizeof link->low_touched);
        if (link->chunk_trim + 1 != trim) /* else the current chunk was begun meanwhile, and not touched by it */
            link->touched_from = nsn_link_offset_of(link->position) / PAGE * PAGE;
        if (link->highest >= NSN_LINK_TABLE_CHUNKS)
            nsn_link_forget_tables(link->file);
        link->highest = 0;
    }
    link->trim = trim;
}

/* --- room ---------------------------------------------------------------------------------------------------------- */

static bool giving_back(const struct nsn_link_out *link) { return link->trim & 1; }

/* While the consumer gives memory back, only a chunk begun since then is safe to write into. */
static bool fits_current(const struct nsn_link_out *link, uint32_t length)
{
    return link->begun && nsn_link_offset_of(link->position) + length <= NSN_LINK_CHUNK &&
           (!giving_back(link) || link->chunk_trim == link->trim);
}

/* While the consumer gives memory back, those from NSN_LINK_KEEP on: it has given them back before they were free, and lets
 * them be. */
static uint32_t free_chunks(const struct nsn_link_out *link)
{
    return giving_back(link) ? NSN_LINK_CHUNKS - NSN_LINK_KEEP - link->high_in_use : link->free_count;
}

/* Free chunks for records of this length in all. */
static bool fits_new(const struct nsn_link_out *link, uint32_t length)
{
    uint32_t needed = length / (NSN_LINK_CHUNK - NSN_RECORD_MAX) + 1; /* at least so much of a chunk is filled */
    return needed <= free_chunks(link);
}

/* How many pool references records of this length in all can have. */
static uint32_t refs_of(uint32_t length, uint64_t pool_bytes)
{
    return pool_bytes == 0 ? 0 : length < 2 * FULL_RECORD ? 1 : length / FULL_RECORD;
}

static bool admits(const struct nsn_link_out *link, uint32_t length, uint64_t pool_bytes)
{
    uint64_t behind = link->sent - link->consumed;
    bool admitted = link->head == link->tail || behind + length + pool_bytes <= link->limit;
    return admitted && link->out_count + refs_of(length, pool_bytes) <= NSN_LINK_REFS;
}

int nsn_link_out_room(struct nsn_link_out *link, uint32_t record_length, uint64_t pool_bytes)
{
    if (link->broken)
        return -EPROTO;
    follow_trim(link);
    bool in_current = fits_current(link, record_length);
    if (in_current && admits(link, record_length, pool_bytes))
        return 1;
    int code = refresh(link);
    if (code < 0)
        return code;
    return admits(link, record_length, pool_bytes) && (in_current || fits_new(link, record_length));
}

int nsn_link_out_room_for(struct nsn_link_out *link, uint32_t length, uint32_t count)
{
    if (link->broken)
        return -EPROTO;
    follow_trim(link);
    int code = refresh(link);
    if (code < 0)
        return code;
    uint32_t a_chunk = NSN_LINK_CHUNK / length, needed = (count + a_chunk - 1) / a_chunk;
    return admits(link, length * count, 0) && needed <= free_chunks(link);
}

uint64_t nsn_link_out_behind(struct nsn_link_out *link)
{
    refresh(link); /* a broken link keeps the last figure that was possible; room() says -EPROTO */
    return link->sent - link->consumed;
}

uint64_t nsn_link_out_pinned(const struct nsn_link_out *link) { return link->pinned; }

uint64_t nsn_link_out_touched(struct nsn_link_out *link)
{
    follow_trim(link);
    refresh(link); /* as in nsn_link_out_behind */
    uint64_t bytes = 2 * PAGE; /* each end's words */
    for (unsigned low = 0; low < NSN_LINK_KEEP; low++)
        bytes += link->low_touched[low];
    if (!link->begun)
        return bytes + (uint64_t)link->high_in_use * NSN_LINK_CHUNK;
    uint32_t physical = link->map[nsn_link_chunk_of(link->position) % NSN_LINK_CHUNKS];
    uint32_t current = (nsn_link_offset_of(link->position) + PAGE - 1) / PAGE * PAGE - link->touched_from;
    if (physical < NSN_LINK_KEEP)
        return bytes + (uint64_t)link->high_in_use * NSN_LINK_CHUNK +
               (current > link->low_touched[physical] ? current - link->low_touched[physical] : 0);
    return bytes + (uint64_t)(link->high_in_use - 1) * NSN_LINK_CHUNK + current;
}

bool nsn_link_out_taken(const struct nsn_link_out *link) { return nsn_load_relaxed(&link->file->consumer.taken) == 1; }
uint32_t nsn_link_out_tail32(const struct nsn_link_out *link) { return (uint32_t)(link->tail / 8); }
uint64_t nsn_link_out_id(const struct nsn_link_out *link) { return link->link_id; }

/* --- writing ------------------------------------------------------------------------------------------------------- */

static uint16_t take_chunk(struct nsn_link_out *link)
{
    uint64_t mask = giving_back(link) ? ~0ull << NSN_LINK_KEEP : ~0ull;
    for (unsigned word = 0; word < FREE_WORDS; word++, mask = ~0ull) {
        uint64_t free_bits = link->free_chunks[word] & mask;
        if (!free_bits)
            continue;
        uint16_t physical = (uint16_t)(word * 64 + (unsigned)__builtin_ctzll(free_bits));
        link->free_chunks[word] &= ~(1ull << (physical % 64));
        link->free_count--;
        link->high_in_use += physical >= NSN_LINK_KEEP;
        return physical;
    }
    assert(!"a chunk is free: room was found");
    abort();
}

/* What a chunk below NSN_LINK_KEEP has touched stays touched when it is left. */
static void note_touched(struct nsn_link_out *link, uint16_t physical, uint32_t end)
{
    if (physical >= NSN_LINK_KEEP)
        return;
    uint32_t bytes = (end + PAGE - 1) / PAGE * PAGE - link->touched_from;
    if (bytes > link->low_touched[physical])
        link->low_touched[physical] = bytes;
}

/* Leaves the current chunk for good, or returns it when nothing was written into it. */
static void end_chunk(struct nsn_link_out *link)
{
    uint64_t logical = nsn_link_chunk_of(link->position);
    uint32_t offset = nsn_link_offset_of(link->position);
    uint16_t physical = link->map[logical % NSN_LINK_CHUNKS];
    link->begun = false;
    if (offset == 0) {
        free_chunk(link, physical);
        return;
    }
    note_touched(link, physical, offset);
    nsn_store_relaxed32((uint32_t *)(void *)(link->chunk + offset), NSN_RECORD_SKIP);
    link->position = (logical + 1) * NSN_LINK_CHUNK;
}

static void begin_chunk(struct nsn_link_out *link)
{
    uint64_t logical = nsn_link_chunk_of(link->position);
    uint16_t physical = take_chunk(link);
    link->map[logical % NSN_LINK_CHUNKS] = physical;
    nsn_copy_to_shared(&link->file->producer.map[logical % NSN_LINK_CHUNKS], &physical, sizeof physical);
    link->chunk = link->file->chunk[physical];
    link->highest = physical > link->highest ? physical : link->highest;
    link->chunk_trim = link->trim;
    link->touched_from = 0;
    link->begun = true;
}

void *nsn_link_out_reserve(struct nsn_link_out *link, uint32_t length)
{
    assert(length % 8 == 0 && length >= sizeof(struct nsn_record) && length <= NSN_RECORD_MAX);
    if (!fits_current(link, length)) {
        if (link->begun)
            end_chunk(link);
        begin_chunk(link);
    }
    link->reserved = length;
    link->reserved_pool = 0;
    return link->chunk + nsn_link_offset_of(link->position);
}

void nsn_link_out_reveal(struct nsn_link_out *link)
{
    link->tail = link->position;
    nsn_store_release(&link->file->producer.tail, link->tail); /* pairs with the loads of tail in nsn_link_in.c */
}

void nsn_link_out_append(struct nsn_link_out *link)
{
    assert(link->reserved);
    uint64_t before = nsn_link_chunk_of(link->position);
    link->position += link->reserved;
    link->sent += link->reserved + link->reserved_pool;
    link->reserved = 0;
    if (nsn_link_chunk_of(link->position) != before) {          /* filled to its last byte */
        note_touched(link, link->map[before % NSN_LINK_CHUNKS], NSN_LINK_CHUNK);
        link->begun = false;
    }
}

void nsn_link_out_commit(struct nsn_link_out *link)
{
    nsn_link_out_append(link);
    nsn_link_out_reveal(link);
}

/* --- pool references ----------------------------------------------------------------------------------------------- */

static uint32_t take_ref(struct nsn_link_out *link)
{
    const uint32_t words = sizeof link->free_ref_words / sizeof link->free_ref_words[0];
    while (link->ref_hint < words && !link->free_ref_words[link->ref_hint])
        link->ref_hint++;
    assert(link->ref_hint < words); /* room was found */
    uint32_t bit = (uint32_t)__builtin_ctz(link->free_ref_words[link->ref_hint]);
    link->free_ref_words[link->ref_hint] &= ~(1u << bit);
    return link->ref_hint * 32 + bit;
}

void nsn_link_out_refer(struct nsn_link_out *link, struct nsn_block *block, uint64_t bytes, struct nsn_pool_ref *ref)
{
    uint32_t index = take_ref(link);
    struct ref *entry = &link->refs[index];
    nsn_block_hold(block);
    entry->block = block;
    entry->bytes = bytes;
    entry->use = entry->use == UINT32_MAX ? 1 : entry->use + 1; /* never 0: memory given back reads as 0 */
    entry->previous = link->newest;
    entry->next = NO_REF;
    if (link->newest != NO_REF)
        link->refs[link->newest].next = index;
    else
        link->oldest = index;
    link->newest = index;
    link->out_count++;
    link->referred++;
    link->pinned += bytes;
    link->reserved_pool += bytes;
    ref->ref = index;
    ref->use = entry->use;
}

static bool is_released(const struct nsn_link_out *link, uint32_t index)
{
    /* pairs with nsn_link_in_release: the consumer has read what the block holds */
    return nsn_load_acquire32(&link->file->consumer.released[index]) == link->refs[index].use;
}

bool nsn_link_out_refers(const struct nsn_link_out *link, const struct nsn_pool_ref *ref, uint64_t bytes)
{
    if (ref->ref >= NSN_LINK_REFS || link->free_ref_words[ref->ref / 32] >> (ref->ref % 32) & 1)
        return false;
    const struct ref *entry = &link->refs[ref->ref];
    return entry->use == ref->use && entry->bytes == bytes && entry->block->segment == ref->segment &&
           entry->block->offset == ref->offset && !is_released(link, ref->ref);
}

static void forget_ref(struct nsn_link_out *link, struct nsn_pool *pool, uint32_t index, uint64_t now_ns)
{
    struct ref *entry = &link->refs[index];
    if (link->cursor == index)
        link->cursor = entry->next;
    *(entry->previous == NO_REF ? &link->oldest : &link->refs[entry->previous].next) = entry->next;
    *(entry->next == NO_REF ? &link->newest : &link->refs[entry->next].previous) = entry->previous;
    link->free_ref_words[index / 32] |= 1u << (index % 32);
    if (index / 32 < link->ref_hint)
        link->ref_hint = index / 32;
    link->out_count--;
    link->reaped++;
    link->pinned -= entry->bytes;
    nsn_block_drop(pool, entry->block, now_ns);
}

size_t nsn_link_out_reap(struct nsn_link_out *link, struct nsn_pool *pool, bool thorough)
{
    if (!link->out_count)
        return 0;
    size_t reaped = 0, kept = 0, most = thorough ? SIZE_MAX : REAP_OLDEST;
    uint64_t now_ns = nsn_now_ns();
    uint32_t next, ref;
    for (ref = link->oldest; ref != NO_REF && kept < most; ref = next) {
        next = link->refs[ref].next;
        if (!is_released(link, ref)) {
            kept++;
            continue;
        }
        forget_ref(link, pool, ref, now_ns);
        reaped++;
    }
    if (ref != NO_REF) {
        if (link->cursor == NO_REF)
            link->cursor = ref;
        for (unsigned looked = 0; looked < REAP_CURSOR && link->cursor != NO_REF; looked++) {
            ref = link->cursor;
            link->cursor = link->refs[ref].next;
            if (!is_released(link, ref))
                continue;
            forget_ref(link, pool, ref, now_ns);
            reaped++;
        }
    }
    if (reaped) /* pairs with the acquire in nsn_link_in_trim_end: those words have been read */
        nsn_store_release(&link->file->producer.reaped, link->reaped);
    return reaped;
}

static bool any_released(const struct nsn_link_out *link)
{
    for (uint32_t ref = link->oldest; ref != NO_REF; ref = link->refs[ref].next)
        if (is_released(link, ref))
            return true;
    return false;
}

/* --- waiting for room ---------------------------------------------------------------------------------------------- */

static void ask(struct nsn_link_out *link, uint64_t consumed, uint64_t released, bool either)
{
    struct nsn_link_producer_words *words = &link->file->producer;
    nsn_store_relaxed(&words->want_either, either);
    nsn_store_relaxed(&words->want_consumed, consumed);
    nsn_store_relaxed(&words->want_released, released);
    link->want += link->want & 1 ? 2 : 1;
    nsn_store_release(&words->want, link->want); /* pairs with the acquire in nsn_link_in_publish: the three words above */
    nsn_fence(); /* with the one in nsn_link_in_publish: either we see its position or it sees that we want */
}

int nsn_link_out_want(struct nsn_link_out *link, uint32_t record_length, uint64_t pool_bytes)
{
    uint64_t cost = record_length + pool_bytes;
    uint64_t spare = cost >= link->limit ? 0 : link->limit - cost; /* what may be behind when it is admitted */
    uint64_t behind = spare < link->limit / 2 ? spare : link->limit / 2;
    uint64_t consumed = link->sent > behind ? link->sent - behind : 0;
    uint32_t refs = refs_of(record_length, pool_bytes);
    bool no_ref = link->out_count + refs > NSN_LINK_REFS;
    uint64_t released = link->referred - link->out_count; /* what has been reaped; now and then more are to come at once */
    ask(link, consumed, no_ref ? released + refs + NSN_LINK_REFS / 16 : 0, false);
    int code = nsn_link_out_room(link, record_length, pool_bytes);
    if (code == 0 && no_ref && any_released(link))
        return 1;
    return code;
}

int nsn_link_out_want_memory(struct nsn_link_out *link)
{
    int code = refresh(link);
    if (code < 0)
        return code;
    uint64_t behind = link->sent - link->consumed, head = link->head;
    uint64_t released = link->referred - link->out_count + (link->out_count > 8 ? link->out_count / 8 : 1);
    ask(link, behind ? link->sent - behind / 2 : UINT64_MAX, link->out_count ? released : UINT64_MAX, true);
    code = refresh(link);
    if (code < 0)
        return code;
    return (!behind && !link->out_count) || nsn_link_chunk_of(link->head) != nsn_link_chunk_of(head) || any_released(link);
}

void nsn_link_out_unwant(struct nsn_link_out *link)
{
    if (link->want & 1)
        nsn_store_release(&link->file->producer.want, ++link->want); /* order with nothing: a late ring does no harm */
}

/* --- giving up ----------------------------------------------------------------------------------------------------- */

void nsn_link_out_stall(struct nsn_link_out *link)
{
    if (!nsn_link_out_stalled(link)) /* pairs with the acquire in nsn_link_in_stalled: the tail is final until it answers */
        nsn_store_release(&link->file->producer.stall, ++link->stall);
}

bool nsn_link_out_stalled(struct nsn_link_out *link)
{
    if (link->broken || link->stall == link->stall_acknowledged)
        return false;
    /* pairs with nsn_link_in_acknowledge_stall: what was discarded was counted */
    uint64_t acknowledged = nsn_load_acquire(&link->file->consumer.stall_acknowledged);
    if (acknowledged < link->stall_acknowledged || acknowledged > link->stall)
        link->broken = true;
    else
        link->stall_acknowledged = acknowledged;
    return !link->broken && link->stall != link->stall_acknowledged;
}

void nsn_link_out_drop(struct nsn_link_out *link, uint64_t messages)
{
    link->dropped += messages;
    nsn_store_relaxed(&link->file->producer.dropped, link->dropped);
}
