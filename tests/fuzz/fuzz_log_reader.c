/* An interest log whose bytes come from the input, read by a session and carried on by an nsnd: both must come to the same,
 * and neither may read outside the file. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"
#include "nsn_log.h"

#define FILE_SIZE 8192u
#define ROOM (FILE_SIZE - NSN_LOG_HEADER_SIZE)

static char directory[192], path[256];
static uint64_t head;

static void set_up(void)
{
    snprintf(directory, sizeof directory, "%s/%d", fuzz_directory(), getpid());
    snprintf(path, sizeof path, "%s/log.1", directory);
    MUST(mkdir(directory, 0700) == 0);
}

/* An entry that is right but for what the input adds to one of its bytes. */
static size_t write_entry(struct input *input, uint8_t *at, size_t room)
{
    struct nsn_log_entry entry = {.op = 1 + take8(input) % 3, .slot = take8(input) % 4, .generation = 1,
                                  .sid = take8(input) % 16};
    if (entry.op == NSN_LOG_ADD) {
        entry.pattern_length = take8(input) % 16;
        if (entry.pattern_length == 15) /* to the end of the file, or over it */
            entry.pattern_length = take16(input) % 4200;
        entry.queue_length = take8(input) % 4;
    }
    entry.length = (uint32_t)(sizeof entry + entry.pattern_length + entry.queue_length + 7) & ~7u;
    size_t whole = entry.length < room ? entry.length : room, given;
    if (whole < sizeof entry)
        return 0;
    const uint8_t *bytes = take_bytes(input, whole - sizeof entry < 32 ? whole - sizeof entry : 32, &given);
    uint8_t lie = take8(input);
    if (lie % 8 == 0)
        ((uint8_t *)&entry)[lie / 8 % sizeof entry] += take8(input);
    memcpy(at, &entry, sizeof entry);
    memset(at + sizeof entry, 'a', whole - sizeof entry);
    memcpy(at + sizeof entry, bytes, given);
    return whole;
}

static size_t write_file(struct input *input, bool *whole)
{
    static uint8_t bytes[FILE_SIZE];
    memset(bytes, 0, sizeof bytes);
    uint8_t kind = take8(input);
    struct nsn_log_header *header = (struct nsn_log_header *)(void *)bytes;
    size_t at = 0, more, given;
    *header = (struct nsn_log_header){.magic = NSN_LOG_MAGIC, .version = NSN_LOG_VERSION, .generation = 1,
                                      .base = take8(input)};
    if (kind % 4 == 0) { /* raw */
        const uint8_t *raw = take_bytes(input, ROOM, &given);
        memcpy(bytes + NSN_LOG_HEADER_SIZE, raw, given);
        at = given;
    } else {
        while (input->at < input->end && (more = write_entry(input, bytes + NSN_LOG_HEADER_SIZE + at, ROOM - at)))
            at += more;
    }
    head = kind & 128 ? take64(input) : 1ull << NSN_LOG_COMMITTED_BITS | at;
    if (!head) /* there is no log: nsnd would start one */
        head++;
    *whole = kind & 64 ? false : true;
    if (!*whole)
        ((uint8_t *)header)[take8(input) % sizeof *header] += take8(input);
    unlink(path);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    MUST(fd >= 0 && write(fd, bytes, sizeof bytes) == sizeof bytes);
    MUST(ftruncate(fd, kind & 32 ? take16(input) % FILE_SIZE : FILE_SIZE) == 0);
    close(fd);
    return at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct nsn_log_reader reader;
    struct nsn_log_writer *writer = NULL;
    char error[256];
    bool whole;
    if (!*path)
        set_up();
    write_file(&input, &whole);
    struct nsn_routes *routes = nsn_routes_new(0);
    int read = nsn_log_reader_open(&reader, directory, &head, error, sizeof error);
    if (read == 0) {
        do
            read = nsn_log_reader_replay(&reader, routes, error, sizeof error);
        while (read == 1);
        MUST(nsn_log_committed(reader.reached) <= ROOM);
        nsn_routes_lookup(routes, "a.b", 3);
    }
    int restored = nsn_log_writer_open(&writer, directory, &head, 4096, error, sizeof error);
    if (restored == 0) { /* what nsnd can carry on, sessions can follow */
        MUST(read == 0);
        MUST(nsn_log_writer_count(writer) == nsn_routes_count(routes));
        struct nsn_target target = {5, 1, 77};
        int result = nsn_log_writer_add(writer, target, "added.*", 7, "", 0);
        MUST(result == 0);
        MUST(nsn_log_reader_replay(&reader, routes, error, sizeof error) == 1);
        MUST(nsn_log_writer_count(writer) == nsn_routes_count(routes));
        nsn_log_writer_close(writer);
    }
    nsn_log_reader_close(&reader);
    nsn_routes_free(routes);
    char name[288];
    for (int generation = 1; generation <= 4; generation++) {
        snprintf(name, sizeof name, "%s/log.%d", directory, generation);
        unlink(name);
    }
    return 0;
}
