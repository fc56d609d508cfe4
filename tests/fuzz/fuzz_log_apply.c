/* Batches of interest changes as sessions send them, raw and nearly right: nsnd's table and what sessions read of its log
 * must agree after each, and a batch that is malformed changes nothing. */
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"
#include "nsn_log.h"
#include "nsn_protocol.h"

#define BATCH_MOST 4096u

static char directory[192];

static void remove_files(void)
{
    char name[256];
    for (int generation = 1; generation <= 64; generation++) {
        snprintf(name, sizeof name, "%s/log.%d", directory, generation);
        unlink(name);
    }
}

static size_t take_change(struct input *input, uint8_t *at, size_t room)
{
    struct nsn_interest_change change = {.op = 1 + take8(input) % 2, .sid = take8(input) % 16};
    if (change.op == NSN_INTEREST_ADD) {
        change.pattern_length = take8(input) % 24;
        change.queue_length = take8(input) % 4;
    }
    size_t whole = (sizeof change + change.pattern_length + change.queue_length + 7) & ~7ull, given;
    if (whole > room)
        return 0;
    const uint8_t *bytes = take_bytes(input, change.pattern_length + change.queue_length, &given);
    uint8_t lie = take8(input);
    if (lie % 16 == 0)
        ((uint8_t *)&change)[lie / 16 % sizeof change] += take8(input);
    memcpy(at, &change, sizeof change);
    memset(at + sizeof change, 'b', whole - sizeof change);
    memcpy(at + sizeof change, bytes, given);
    return whole;
}

/* Returns its length; *count: of the changes that it is said to have. */
static size_t take_batch(struct input *input, uint8_t batch[BATCH_MOST], uint32_t *count)
{
    size_t length = 0, more;
    uint8_t kind = take8(input);
    if (kind % 4 == 0) {
        const uint8_t *raw = take_bytes(input, take8(input), &length);
        memcpy(batch, raw, length);
        *count = kind & 16 ? (uint32_t)take(input, 4) : (uint32_t)(length / sizeof(struct nsn_interest_change));
        return length;
    }
    *count = 0;
    for (uint32_t i = take8(input) % 32; i && (more = take_change(input, batch + length, BATCH_MOST - length)); i--) {
        length += more;
        ++*count;
    }
    if (kind % 16 == 1)
        *count = (uint32_t)take(input, 4);
    return length;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct nsn_log_writer *writer;
    struct nsn_log_reader reader;
    uint64_t head = 0;
    char error[256];
    if (!*directory) {
        snprintf(directory, sizeof directory, "%s/%d", fuzz_directory(), getpid());
        MUST(mkdir(directory, 0700) == 0);
    }
    MUST(nsn_log_writer_open(&writer, directory, &head, 4096, error, sizeof error) == 0);
    MUST(nsn_log_reader_open(&reader, directory, &head, error, sizeof error) == 0);
    struct nsn_routes *routes = nsn_routes_new(0);
    while (input.at < input.end) {
        static uint8_t batch[BATCH_MOST];
        uint32_t count, failed = UINT32_MAX, slot = take8(&input) % 3;
        size_t before = nsn_log_writer_count(writer), length = take_batch(&input, batch, &count);
        uint8_t *exact = malloc(length ? length : 1); /* so that a read behind its end is seen */
        memcpy(exact, batch, length);
        int result = nsn_log_writer_apply(writer, slot, 1, exact, length, count, &failed);
        free(exact);
        MUST(result == 0 || result == -EBADMSG || result == -EINVAL);
        MUST(result != -EBADMSG || nsn_log_writer_count(writer) == before);
        MUST(result != 0 || failed == count);
        MUST(result != -EINVAL || failed < count);
        if (take8(&input) % 8 == 0)
            MUST(nsn_log_writer_session_gone(writer, slot, 1) >= 0);
        MUST(nsn_log_reader_replay(&reader, routes, error, sizeof error) >= 0);
        MUST(nsn_routes_count(routes) == nsn_log_writer_count(writer));
        MUST(reader.base + reader.count == nsn_log_writer_number(writer));
    }
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    remove_files();
    return 0;
}
