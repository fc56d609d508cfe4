/* What a link costs: 64 B round trips between two polling processes, and writing and reading one message; and for comparison
 * what the processors take to hand one bare word back and forth, which on virtual machines varies threefold by itself.
 *
 *   gcc -std=gnu11 -O2 -D_GNU_SOURCE -Ishim/libnsn benchmarks/c/link.c shim/libnsn/nsn_link_*.c shim/libnsn/nsn_memfd.c \
 *       shim/libnsn/nsn_pool.c -o /tmp/link && /tmp/link
 *
 * The processes are pinned to two processors where there are two. Prints one figure a line: name, value, unit. */
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nsn_link.h"
#include "nsn_shared.h"

#define PAYLOAD 64u
#define ROUND_TRIPS 200000
#define ONE_WAY (1024u * 2048u)
#define BATCH 64u
#define SUBJECT "bench.subject"
#define RECORD ((uint32_t)((sizeof(struct nsn_record) + 8 + sizeof SUBJECT - 1 + PAYLOAD + 7) / 8 * 8))

static void expect(bool true_, const char *what)
{
    if (true_)
        return;
    fprintf(stderr, "link: %s\n", what);
    exit(1);
}

static struct nsn_link_out *create(uint64_t id, int *fd)
{
    struct nsn_link_out *out;
    char error[256] = "";
    expect(nsn_link_out_create(&out, id, 0, fd, error, sizeof error) == 0, error);
    return out;
}

static struct nsn_link_in *map(int fd, uint64_t id)
{
    struct nsn_link_in *in;
    char error[256] = "";
    expect(nsn_link_in_map(&in, fd, id, error, sizeof error) == 0, error);
    close(fd);
    return in;
}

/* Words of a page that both processes have from the start. */
static struct bare { uint64_t word __attribute__((aligned(4 * NSN_CACHE_LINE))); } *bare;

/* As a publish writes it; the stamp is the caller's. */
static bool write_message(struct nsn_link_out *out, uint64_t stamp, const uint8_t *payload)
{
    if (nsn_link_out_room(out, RECORD, 0) != 1)
        return false;
    uint8_t *at = nsn_link_out_reserve(out, RECORD);
    struct nsn_record record = {.length = RECORD, .kind = NSN_RECORD_MESSAGE, .sid_count = 1,
                                .subject_length = sizeof SUBJECT - 1, .payload_length = PAYLOAD, .stamp = stamp};
    nsn_copy_to_shared(at, &record, sizeof record);
    nsn_copy_to_shared(at + sizeof record, &(uint32_t){1}, 4);
    nsn_copy_to_shared(at + sizeof record + 8, SUBJECT, sizeof SUBJECT - 1);
    nsn_copy_to_shared(at + sizeof record + 8 + sizeof SUBJECT - 1, payload, PAYLOAD);
    nsn_link_out_commit(out);
    return true;
}

static bool read_message(struct nsn_link_in *in, uint8_t *payload)
{
    struct nsn_record_view view;
    int code = nsn_link_in_peek(in, &view, UINT64_MAX);
    expect(code >= 0, "the link is broken");
    if (code == 0)
        return false;
    memcpy(payload, view.payload, PAYLOAD);
    nsn_link_in_consume(in);
    return true;
}

static void pin(int cpu)
{
    cpu_set_t all, one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_getaffinity(0, sizeof all, &all) == 0 && CPU_COUNT(&all) >= 2 && CPU_ISSET(cpu, &all))
        expect(sched_setaffinity(0, sizeof one, &one) == 0, "cannot pin to a processor");
}

static void send_fd(int socket, int fd)
{
    char space[CMSG_SPACE(sizeof fd)] = {0}, byte = 0;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *control = CMSG_FIRSTHDR(&message);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(control), &fd, sizeof fd);
    expect(sendmsg(socket, &message, 0) == 1, "cannot hand a link over");
    close(fd);
}

static int receive_fd(int socket)
{
    char space[CMSG_SPACE(sizeof(int))], byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    expect(recvmsg(socket, &message, 0) == 1 && CMSG_FIRSTHDR(&message), "no link was handed over");
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

/* The other process: answers round trips, then reads what is sent one way, then says so. */
static void answer(int socket)
{
    int fd;
    uint8_t payload[PAYLOAD];
    pin(1);
    struct nsn_link_out *out = create(2, &fd);
    send_fd(socket, fd);
    struct nsn_link_in *in = map(receive_fd(socket), 1);
    for (uint64_t i = 1; i <= ROUND_TRIPS; i++) {
        while (nsn_load_acquire(&bare[0].word) != i)
            nsn_cpu_relax();
        nsn_store_release(&bare[1].word, i);
    }
    for (int i = 0; i < ROUND_TRIPS; i++) {
        while (!read_message(in, payload))
            nsn_cpu_relax();
        nsn_link_in_publish(in);
        expect(write_message(out, nsn_now_ns(), payload), "no room for an answer");
    }
    for (uint32_t read = 0, batch = 0; read < ONE_WAY;) {
        if (read_message(in, payload))
            read++, batch++;
        else
            nsn_cpu_relax();
        if (batch == BATCH || read == ONE_WAY)
            nsn_link_in_publish(in), batch = 0;
    }
    expect(write_message(out, 0, payload), "no room for the last answer");
    _exit(0);
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static void measure_bare(void)
{
    static uint64_t took_ns[ROUND_TRIPS];
    for (uint64_t i = 1; i <= ROUND_TRIPS; i++) {
        uint64_t began_ns = nsn_now_ns();
        nsn_store_release(&bare[0].word, i);
        while (nsn_load_acquire(&bare[1].word) != i)
            nsn_cpu_relax();
        took_ns[i - 1] = nsn_now_ns() - began_ns;
    }
    qsort(took_ns, ROUND_TRIPS, sizeof took_ns[0], by_value);
    printf("rtt_bare_p50 %llu ns\n", (unsigned long long)took_ns[ROUND_TRIPS / 2]);
}

static void measure_round_trips(struct nsn_link_out *out, struct nsn_link_in *in)
{
    static uint64_t took_ns[ROUND_TRIPS];
    uint8_t payload[PAYLOAD] = {0};
    for (int i = 0; i < ROUND_TRIPS; i++) {
        uint64_t began_ns = nsn_now_ns();
        expect(write_message(out, began_ns, payload), "no room for a question");
        while (!read_message(in, payload))
            nsn_cpu_relax();
        nsn_link_in_publish(in);
        took_ns[i] = nsn_now_ns() - began_ns;
    }
    qsort(took_ns, ROUND_TRIPS, sizeof took_ns[0], by_value);
    printf("rtt_64_p50 %llu ns\n", (unsigned long long)took_ns[ROUND_TRIPS / 2]);
    printf("rtt_64_p99 %llu ns\n", (unsigned long long)took_ns[ROUND_TRIPS / 100 * 99]);
}

/* Medians over blocks of BLOCK messages: what else runs on the machine does not count. */
#define BLOCK 1024u
#define BLOCKS (ONE_WAY / BLOCK)

static double median_per_message(uint64_t *took_ns, uint32_t count)
{
    qsort(took_ns, count, sizeof *took_ns, by_value);
    return (double)took_ns[count / 2] / BLOCK;
}

static void measure_one_way(struct nsn_link_out *out, struct nsn_link_in *in)
{
    static uint64_t took_ns[BLOCKS];
    uint8_t payload[PAYLOAD] = {0};
    uint64_t began_ns = nsn_now_ns(), waited = 0;
    for (uint32_t block = 0; block < BLOCKS; block++) {
        uint64_t block_ns = nsn_now_ns();
        for (uint32_t sent = 0; sent < BLOCK;) {
            if (write_message(out, nsn_now_ns(), payload))
                sent++;
            else
                waited++, nsn_cpu_relax();
        }
        took_ns[block] = nsn_now_ns() - block_ns;
    }
    while (!read_message(in, payload))
        nsn_cpu_relax();
    uint64_t read_ns = nsn_now_ns() - began_ns;
    printf("publish_64 %.1f ns\n", median_per_message(took_ns, BLOCKS));
    printf("one_way_64 %.2f million/s\n", ONE_WAY * 1e3 / (double)read_ns);
    printf("full %llu times\n", (unsigned long long)waited);
}

/* Both ends in one process and in its cache: what the instructions cost. */
static void measure_alone(void)
{
    static uint64_t write_ns[BLOCKS], read_ns[BLOCKS];
    int fd;
    uint8_t payload[PAYLOAD] = {0};
    struct nsn_link_out *out = create(3, &fd);
    struct nsn_link_in *in = map(fd, 3);
    for (uint32_t block = 0; block < BLOCKS; block++) {
        uint64_t began_ns = nsn_now_ns();
        for (uint32_t i = 0; i < BLOCK; i++)
            expect(write_message(out, 1, payload), "no room");
        uint64_t between_ns = nsn_now_ns();
        for (uint32_t i = 0; i < BLOCK; i++)
            expect(read_message(in, payload), "nothing there");
        nsn_link_in_publish(in);
        read_ns[block] = nsn_now_ns() - between_ns;
        write_ns[block] = between_ns - began_ns;
    }
    printf("write_64 %.1f ns\n", median_per_message(write_ns, BLOCKS));
    printf("read_64 %.1f ns\n", median_per_message(read_ns, BLOCKS));
    nsn_link_in_destroy(in);
    nsn_link_out_destroy(out, NULL);
}

int main(void)
{
    int sockets[2], fd, status;
    expect(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "no sockets");
    bare = mmap(NULL, 2 * sizeof *bare, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    expect(bare != MAP_FAILED, "no memory");
    fflush(stdout);
    pid_t child = fork();
    expect(child >= 0, "cannot fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        answer(sockets[1]);
    }
    pin(0);
    struct nsn_link_out *out = create(1, &fd);
    send_fd(sockets[0], fd);
    struct nsn_link_in *in = map(receive_fd(sockets[0]), 2);
    measure_bare();
    measure_round_trips(out, in);
    measure_one_way(out, in);
    expect(waitpid(child, &status, 0) == child && status == 0, "the other process failed");
    measure_alone();
    nsn_link_in_destroy(in);
    nsn_link_out_destroy(out, NULL);
    return 0;
}
