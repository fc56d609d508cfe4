/* A session at a node that says anything: packets right, nearly right and raw, with descriptors of all kinds, in turns with
 * all that a program does. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "fuzz.h"
#include "nsn_link_layout.h"
#include "nsn_log.h"
#include "nsn_memfd.h"
#include "nsn_protocol.h"
#include "nsn_session.h"
#include "nsn_slots.h"

#define OPS_MOST 200
#define PEERS 4u                 /* slots 0 to 3; the session is in one of them */
#define SEGMENT_SIZE 65536u

static char directory[96], socket_path[128];
static int listener = -1;
static struct nsn_slots *slots;
static struct nsn_log_writer *log_writer;
static uint32_t generations[PEERS];

static void set_up(void)
{
    char error[256];
    snprintf(directory, sizeof directory, "%s/%d", fuzz_directory(), getpid());
    snprintf(socket_path, sizeof socket_path, "%s/sock", directory);
    MUST(mkdir(directory, 0700) == 0);
    MUST(nsn_slots_open(&slots, directory, error, sizeof error) == 0);
    MUST(nsn_log_writer_open(&log_writer, directory, nsn_slots_log(slots), 0, error, sizeof error) == 0);
    for (uint32_t slot = 0; slot < PEERS; slot++) {
        MUST(nsn_slots_claim(slots, (uint64_t[2]){slot, 1}, 1, 1, getuid(), &generations[slot]) == (int)slot);
        MUST(nsn_log_writer_add(log_writer, (struct nsn_target){slot, generations[slot], 1}, "s", 1, "", 0) == 0);
        MUST(nsn_log_writer_add(log_writer, (struct nsn_target){slot, generations[slot], 2}, "q", 1, "g", 1) == 0);
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path);
    unlink(socket_path);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    MUST(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 16) == 0);
}

/* --- what the node says --------------------------------------------------------------------------------------------------- */

struct node {
    int end;                     /* of the session's connection, or -1 */
    struct nsn_session *session;
};

static void say(const struct node *node, const void *packet, size_t length, int fd)
{
    struct iovec part = {(void *)packet, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary = {0};
    if (fd >= 0) {
        message.msg_control = ancillary.bytes;
        message.msg_controllen = sizeof ancillary.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    if (node->end >= 0)
        sendmsg(node->end, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* A link with two records in it, and then what the input writes over it. */
static int take_link(struct input *input, uint64_t link_id)
{
    char error[256];
    int fd = nsn_memfd_create("fuzz", sizeof(struct nsn_link_file), error, sizeof error);
    struct nsn_link_file *file = nsn_memfd_map(fd, sizeof *file, PROT_READ | PROT_WRITE, error, sizeof error);
    MUST(file);
    file->producer = (struct nsn_link_producer_words){.magic = NSN_LINK_MAGIC, .version = NSN_LINK_VERSION,
                                                      .chunks = NSN_LINK_CHUNKS, .link_id = link_id, .tail = 48 + 72};
    uint8_t *at = file->chunk[0];
    struct nsn_record first = {.length = 48, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1,
                               .payload_length = 7,
                               .stamp = 1};
    struct nsn_record second = {.length = 72, .kind = NSN_RECORD_MESSAGE, .flags = NSN_RECORD_POOL, .sid_count = 1,
                                .subject_length = 1, .payload_length = 100, .stamp = 2};
    struct nsn_pool_ref ref = {.segment = 256, .ref = take8(input) % 4, .use = 1, .offset = take8(input)};
    uint8_t lie = take8(input);
    uint32_t sid = 1 + lie % 3;
    if (lie > 192)
        ref.offset = take64(input);
    else if (lie > 128)
        ref.ref = take16(input);
    else if (lie > 96)
        second.payload_length = take(input, 4);
    memcpy(at, &first, sizeof first);
    memcpy(at + sizeof first, &sid, sizeof sid);
    memcpy(at + sizeof first + 8, "spayload", 8);
    memcpy(at + 48, &second, sizeof second);
    memcpy(at + 48 + sizeof second, &sid, sizeof sid);
    memcpy(at + 48 + sizeof second + 8, &ref, sizeof ref);
    at[48 + sizeof second + 8 + sizeof ref] = 's';
    for (uint8_t lies = take8(input) % 4; lies; lies--) {
        uint8_t *where = take8(input) % 2 ? at : (uint8_t *)&file->producer;
        uint64_t value = take64(input);
        memcpy(where + take8(input), &value, 1u << take8(input) % 4);
    }
    munmap(file, sizeof *file);
    MUST(nsn_memfd_seal(fd, NSN_LINK_SEALS, error, sizeof error) == 0);
    return fd;
}

static int take_segment(struct input *input)
{
    static const int seals[] = {F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL, F_SEAL_SHRINK, 0};
    char error[256];
    int fd = nsn_memfd_create("fuzz", take8(input) % 4 ? SEGMENT_SIZE : 4096, error, sizeof error);
    int seal = seals[take8(input) % 4 % 3];
    MUST(fd >= 0 && (seal == 0 || nsn_memfd_seal(fd, seal, error, sizeof error) == 0));
    return fd;
}

/* A descriptor or -1. */
static int take_descriptor(struct input *input)
{
    switch (take8(input) % 6) {
    case 0: return take_link(input, take8(input) % 4);
    case 1: return take_segment(input);
    case 2: return open("/dev/null", O_RDWR | O_CLOEXEC);
    case 3: return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    default: return -1;
    }
}

static struct nsn_packet header(uint16_t type) { return (struct nsn_packet){NSN_PROTOCOL_MAGIC, type, NSN_PROTOCOL_VERSION}; }

static void say_raw(const struct node *node, struct input *input)
{
    _Alignas(8) uint8_t bytes[1024] = {0};
    struct nsn_packet front = header(take8(input) % 18);
    size_t given, length = take16(input) % sizeof bytes;
    uint8_t lie = take8(input);
    const uint8_t *body = take_bytes(input, 64, &given);
    memcpy(bytes, &front, sizeof front);
    memcpy(bytes + sizeof front, body, given);
    if (lie % 16 == 0)
        bytes[lie / 16 % 8] += 1;
    int fd = take_descriptor(input);
    say(node, bytes, length, fd);
    if (fd >= 0)
        close(fd);
}

static void say_welcome(const struct node *node, struct input *input)
{
    uint8_t how = take8(input), slot = take8(input) % PEERS;
    struct nsn_welcome welcome = {.packet = header(NSN_WELCOME), .slot = slot, .generation = generations[slot],
                                  .acknowledged = how & 2 ? take8(input) : 0, .reattached = how & 1, .max_payload = 1 << 20};
    if (how % 16 != 15)
        snprintf(welcome.directory, sizeof welcome.directory, "%s", directory);
    if (how % 32 == 31)
        memset(welcome.directory, '/', sizeof welcome.directory);
    if (how % 16 == 14)
        welcome.slot = (uint32_t)take(input, 4);
    say(node, &welcome, sizeof welcome, -1);
}

static void say_link(const struct node *node, struct input *input)
{
    uint8_t slot = take8(input) % (PEERS + 1);
    uint8_t how = take8(input);
    struct nsn_link_packet packet = {.packet = header(NSN_LINK), .peer_slot = slot,
                                     .peer_generation = slot < PEERS ? generations[slot] : 1, .link_id = how % 4,
                                     .peer_uid = getuid() + how / 192}; /* or another user */
    int fd = take_link(input, packet.link_id);
    say(node, &packet, sizeof packet, fd);
    close(fd);
}

static void say_segment(const struct node *node, struct input *input)
{
    uint8_t slot = take8(input) % (PEERS + 1), how = take8(input);
    struct nsn_segment_packet packet = {.packet = header(NSN_SEGMENT), .peer_slot = slot,
                                        .peer_generation = slot < PEERS ? generations[slot] : 1, .segment = 256u + how % 4,
                                        .size = how % 16 ? SEGMENT_SIZE : take64(input)};
    int fd = take_segment(input);
    say(node, &packet, sizeof packet, fd);
    close(fd);
}

static void say_done(const struct node *node, struct input *input)
{
    struct nsn_interest_done done = {.packet = header(NSN_INTEREST_DONE), .sequence = take8(input), .failed = take8(input) % 8};
    uint8_t how = take8(input);
    done.error = how % 4 == 0 ? (int32_t)take(input, 4) : how % 4 == 1 ? -EINVAL : 0;
    nsn_slots_acknowledge(slots, take8(input) % PEERS, take8(input));
    say(node, &done, sizeof done, -1);
}

static void say_gone(const struct node *node, struct input *input)
{
    uint8_t slot = take8(input) % (PEERS + 1);
    struct nsn_peer_gone gone = {header(NSN_PEER_GONE), slot, slot < PEERS ? generations[slot] : 1};
    say(node, &gone, sizeof gone, -1);
}

/* Takes what the session has said, descriptors included. */
static void listen_to(const struct node *node)
{
    static uint8_t bytes[NSN_PACKET_MAX];
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary;
    for (;;) {
        struct iovec part = {bytes, sizeof bytes};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                                 .msg_controllen = sizeof ancillary.bytes};
        if (node->end < 0 || recvmsg(node->end, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0)
            return;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
        if (!cmsg)
            continue;
        int fd;
        memcpy(&fd, CMSG_DATA(cmsg), sizeof fd);
        close(fd);
    }
}

static void hang_up(struct node *node)
{
    if (node->end >= 0)
        close(node->end);
    node->end = -1;
}

/* --- what the program does ------------------------------------------------------------------------------------------------ */

/* Few packets fit into the socket, so that some wait in the session. */
static void narrow(const struct node *node)
{
    int least = 1;
    MUST(setsockopt(nsn_session_control_fd(node->session), SOL_SOCKET, SO_SNDBUF, &least, sizeof least) == 0);
}

static void reattach(struct node *node)
{
    hang_up(node);
    nsn_session_process(node->session, 0);
    if (nsn_session_control_fd(node->session) < 0 && nsn_session_reattach(node->session, socket_path) == 0) {
        node->end = accept(listener, NULL, NULL);
        narrow(node);
    }
}

static void receive(struct nsn_session *session, bool keep)
{
    static struct nsn_message messages[64];
    static uint8_t blob[65536];
    int count = nsn_receive(session, messages, 64, blob, sizeof blob, 0);
    for (int i = 0; i < count; i++) {
        const struct nsn_message *message = &messages[i];
        uint64_t names = (uint64_t)message->offset + message->subject_length + message->reply_length;
        uint64_t inside = (uint64_t)message->header_length + message->payload_length;
        if (!(message->flags & NSN_MESSAGE_LARGE)) {
            MUST(names + inside <= sizeof blob);
            continue;
        }
        const uint8_t *data = nsn_large(session, message->large);
        MUST(data && names <= sizeof blob);
        read_all(data, inside);
        if (!keep)
            nsn_large_release(session, message->large);
    }
}

static void publish(struct nsn_session *session, struct input *input)
{
    static uint8_t payload[70000];
    static const char *const subjects[] = {"s", "q", "other", "s..s"};
    const char *subject = subjects[take8(input) % 4];
    if (nsn_publish(session, subject, strlen(subject), "r", 1, NULL, 0, payload, take16(input)) == -EAGAIN)
        nsn_publish_give_up(session);
}

static void subscribe(struct nsn_session *session, struct input *input)
{
    uint8_t how = take8(input);
    uint32_t sid = 1 + how % 4;
    switch (how / 4 % 6) {
    case 0: nsn_subscribe(session, sid, "s", 1, "", 0); break;
    case 1: nsn_subscribe(session, sid, "q", 1, "g", 1); break;
    case 2: nsn_unsubscribe(session, sid, how / 32); break;
    case 3: nsn_drain(session, sid); break;
    case 4: nsn_subscribe(session, sid, ">.a", 3, "", 0); break;
    default: nsn_interest_settled(session, 0);
    }
}

static void do_odds(struct nsn_session *session, uint8_t how, int *token)
{
    struct nsn_event event;
    switch (how % 10) {
    case 0: *token = nsn_barrier_begin(session); break;
    case 1: nsn_barrier_done(session, *token); break;
    case 2: nsn_barrier_cancel(session, *token); break;
    case 3: nsn_trim(session); break;
    case 4:
        if (nsn_arm(session))
            nsn_disarm(session);
        break;
    case 5: nsn_session_accept_loss(session); break;
    case 6: nsn_large_release(session, how / 10); break;
    case 7: nsn_ping(session, how); break;
    case 8: nsn_links_taken(session); break;
    default:
        while (nsn_next_event(session, &event))
            MUST(memchr(event.text, 0, sizeof event.text));
    }
}

static void step(struct node *node, struct input *input, int *token)
{
    switch (take8(input) % 16) {
    case 0: say_raw(node, input); break;
    case 1: say_welcome(node, input); break;
    case 2:
    case 3: say_link(node, input); break;
    case 4: say_segment(node, input); break;
    case 5: say_done(node, input); break;
    case 6: say_gone(node, input); break;
    case 7: hang_up(node); break;
    case 8: reattach(node); break;
    case 9: receive(node->session, take8(input) % 2); break;
    case 10: publish(node->session, input); break;
    case 11: subscribe(node->session, input); break;
    case 12: do_odds(node->session, take8(input), token); break;
    case 13: listen_to(node); break;
    default: nsn_session_process(node->session, 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct nsn_session_options options = {.socket_path = socket_path, .name = "fuzz", .application_id = 4222,
                                          .link_limit = 1 << 16};
    char error[256];
    int token = 0;
    if (listener < 0)
        set_up();
    struct node node = {.session = nsn_session_open(&options, error, sizeof error)};
    MUST(node.session);
    node.end = accept(listener, NULL, NULL);
    MUST(node.end >= 0);
    narrow(&node);
    for (int ops = 0; ops < OPS_MOST && input.at < input.end; ops++) {
        step(&node, &input, &token);
        int state = nsn_session_state(node.session);
        MUST(state >= NSN_CONNECTING && state <= NSN_LOST && strlen(nsn_session_error(node.session)) < 512);
    }
    nsn_session_close(node.session);
    hang_up(&node);
    return 0;
}
