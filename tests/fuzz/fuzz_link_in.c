/* The consumer's end of a link, whose every word and byte comes from the input: written raw, or as records that are nearly
 * right, in turns with all that a consumer does. */
#include <errno.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "nsn_link_layout.h"

#define OPS_MOST 256
#define GUARD (1u << 20)

static struct nsn_link_file *file;

static struct nsn_link_file *make_file(void)
{
    uint8_t *around = mmap(NULL, sizeof *file + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    MUST(around != MAP_FAILED);
    void *at = mmap(around + GUARD, sizeof *file, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    MUST(at == around + GUARD);
    return at;
}

static void reset_file(void)
{
    if (!file)
        file = make_file();
    MUST(madvise(file, sizeof *file, MADV_REMOVE) == 0);
    file->producer.magic = NSN_LINK_MAGIC;
    file->producer.version = NSN_LINK_VERSION;
    file->producer.chunks = NSN_LINK_CHUNKS;
    file->producer.link_id = 7;
    for (uint16_t i = 0; i < 8; i++)
        file->producer.map[i] = i;
}

/* The chunk and offset of the tail, wherever the words say that it is. */
static uint8_t *at_tail(uint32_t *left)
{
    uint64_t tail = file->producer.tail;
    uint32_t physical = file->producer.map[nsn_link_chunk_of(tail) % NSN_LINK_CHUNKS] % NSN_LINK_CHUNKS;
    *left = NSN_LINK_CHUNK - nsn_link_offset_of(tail);
    return file->chunk[physical] + nsn_link_offset_of(tail);
}

/* A record that is right but for what the input adds to one of its fields. */
static void write_record(struct input *input)
{
    uint8_t kind = take8(input), flags = take8(input);
    struct nsn_record record = {.kind = 1 + (kind % 16 == 0) + 2 * (kind % 4 == 1),
                                .flags = (flags % 3 == 0) | (flags % 7 == 1 ? NSN_RECORD_PARTS : 0),
                                .sid_count = take8(input) % 5,
                                .subject_length = take8(input), .reply_length = take8(input) % 64,
                                .header_length = take8(input) % 32, .payload_length = take16(input), .stamp = take8(input)};
    bool pool = record.flags & NSN_RECORD_POOL;
    if (record.kind == NSN_RECORD_PART)
        record.sid_count = 0, record.subject_length = record.reply_length = 0, record.header_length = 0;
    bool outside = pool || record.flags & NSN_RECORD_PARTS;
    uint32_t left, inside = outside ? 0 : record.header_length + (uint32_t)record.payload_length;
    uint32_t sids = (record.sid_count * 4u + 7) / 8 * 8;
    uint32_t length = (uint32_t)sizeof record + sids + record.subject_length + record.reply_length +
                      inside + (pool ? (uint32_t)sizeof(struct nsn_pool_ref) : 0);
    record.length = (length + 7) & ~7u;
    uint8_t *at = at_tail(&left);
    if (record.length > left) {
        memcpy(at, &(uint32_t){NSN_RECORD_SKIP}, left < 4 ? left : 4);
        file->producer.tail += left;
        at = at_tail(&left);
    }
    uint64_t tail = file->producer.tail + (record.length < left ? record.length : left);
    uint8_t lie = take8(input);
    if (lie % 8 == 0 && lie / 8 < sizeof record)
        ((uint8_t *)&record)[lie / 8] += take8(input);
    size_t more;
    const uint8_t *bytes = take_bytes(input, 64, &more);
    memcpy(at, &record, left < sizeof record ? left : sizeof record);
    if (left > sizeof record)
        memcpy(at + sizeof record, bytes, more < left - sizeof record ? more : left - sizeof record);
    nsn_store_release(&file->producer.tail, tail & ~7ull);
}

static void write_raw(struct input *input)
{
    size_t length;
    uint32_t chunk = take8(input) % 4, offset = take16(input);
    const uint8_t *bytes = take_bytes(input, take8(input), &length);
    memcpy(file->chunk[chunk] + offset, bytes, length < NSN_LINK_CHUNK - offset ? length : NSN_LINK_CHUNK - offset);
}

static void write_word(struct input *input)
{
    size_t words = offsetof(struct nsn_link_producer_words, map) / 8;
    ((uint64_t *)(void *)&file->producer)[take8(input) % words] = take64(input);
}

/* Everything lies within the record, the record within its chunk and before the tail. */
static void check_view(struct nsn_link_in *link, const struct nsn_record_view *view)
{
    const struct nsn_record *record = &view->record;
    const uint8_t *subject = (const uint8_t *)view->subject, *reply = (const uint8_t *)view->reply;
    const uint8_t *first = subject - sizeof *record - (record->sid_count * 4u + 7) / 8 * 8 -
                           (record->flags & NSN_RECORD_POOL ? sizeof view->pool_ref : 0);
    const uint8_t *last = first + record->length;
    uint64_t at = (uint64_t)(first - file->chunk[0]);
    MUST(first >= file->chunk[0] && at < sizeof file->chunk && at % NSN_LINK_CHUNK + record->length <= NSN_LINK_CHUNK);
    MUST(record->length <= nsn_link_in_tail(link) - nsn_link_in_head(link));
    MUST(record->sid_count <= NSN_RECORD_SIDS && record->subject_length <= 4096 && record->reply_length <= 4096);
    MUST(subject >= first && subject <= last && record->subject_length <= last - subject);
    MUST(reply >= first && reply <= last && record->reply_length <= last - reply);
    read_all(subject, record->subject_length);
    read_all(reply, record->reply_length);
    if (record->flags & (NSN_RECORD_POOL | NSN_RECORD_PARTS)) {
        MUST(!view->headers && !view->payload);
        MUST(record->header_length + record->payload_length <= 72ull << 20);
        MUST(record->kind != NSN_RECORD_MESSAGE || record->flags & NSN_RECORD_PARTS ||
             (view->pool_ref.ref < NSN_LINK_REFS && view->pool_ref.use));
        return;
    }
    MUST(view->headers >= first && view->headers <= last && record->header_length <= last - view->headers);
    MUST(view->payload >= first && view->payload <= last && record->payload_length <= (uint64_t)(last - view->payload));
    read_all(view->headers, record->header_length);
    read_all(view->payload, record->payload_length);
}

static void read_records(struct nsn_link_in *link, uint8_t how)
{
    struct nsn_record_view view;
    int code = 0;
    for (int i = 0; i < 1 + how % 8; i++) {
        code = nsn_link_in_peek(link, &view, how & 64 ? 100 : UINT64_MAX);
        MUST(code == 0 || code == 1 || code == -EPROTO);
        if (code != 1)
            break;
        check_view(link, &view);
        if (view.record.flags & NSN_RECORD_PARTS && how & 16) {
            uint64_t bytes = view.record.header_length + view.record.payload_length;
            uint8_t *copy = bytes < nsn_link_in_behind(link) ? malloc(bytes) : NULL;
            code = nsn_link_in_parts(link, &view, copy);
            free(copy);
            MUST(code == 1 || code == -EPROTO);
            if (code != 1)
                break;
        }
        nsn_link_in_consume(link);
        if (view.record.kind == NSN_RECORD_MESSAGE && view.record.flags & NSN_RECORD_POOL && how & 8)
            nsn_link_in_release(link, view.pool_ref.ref, view.pool_ref.use);
    }
    if (code < 0) /* broken for good */
        MUST(nsn_link_in_peek(link, &view, UINT64_MAX) == -EPROTO);
}

static void act(struct nsn_link_in *link, uint8_t op, uint8_t how)
{
    uint64_t number;
    switch (op) {
    case 0: nsn_link_in_publish(link); break;
    case 1:
        if (nsn_link_in_stalled(link))
            read_records(link, how);
        nsn_link_in_acknowledge_stall(link, &number);
        break;
    case 2:
        nsn_link_in_trim_begin(link);
        nsn_link_in_trim_end(link, how & 1);
        break;
    case 3: nsn_link_in_stamp(link, &number); break;
    case 4:
        nsn_link_in_empty(link);
        MUST(nsn_link_in_tail(link) >= nsn_link_in_head(link));
        MUST(nsn_link_in_behind(link) <= sizeof file->chunk);
        break;
    default: read_records(link, how);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct nsn_link_in *link;
    char error[256];
    reset_file();
    if (nsn_link_in_adopt(&link, file, 7, error, sizeof error))
        abort();
    for (int ops = 0; ops < OPS_MOST && input.at < input.end; ops++) {
        uint8_t op = take8(&input);
        switch (op % 16) {
        case 0: write_word(&input); break;
        case 1: write_raw(&input); break;
        case 2: {
            uint16_t place = take8(&input), chunk = take16(&input);
            file->producer.map[place % 8] = place < 224 ? chunk % NSN_LINK_CHUNKS : chunk;
            break;
        }
        case 3: nsn_store_release(&file->producer.tail, file->producer.tail + take8(&input) * 8ull); break;
        case 4:
        case 5:
        case 6:
        case 7: write_record(&input); break;
        default: act(link, op % 16 - 8, take8(&input));
        }
    }
    nsn_link_in_destroy(link);
    return 0;
}
