/* Serving a session's changes of interest: see nsn_serve.h. */
#include "nsn_serve.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "nsn_protocol.h"
#include "nsn_shared.h"

/* The next packet, left where it is: its length, 0 when it cannot be taken the short way, -1 when there is none. */
static ssize_t peek(int fd, void *bytes, size_t size)
{
    struct iovec part = {bytes, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1}; /* descriptors are not received by looking */
    ssize_t length = recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);
    if (length < 0)
        return errno == EAGAIN || errno == EINTR ? -1 : 0;
    return length < (ssize_t)sizeof(struct nsn_interest) || message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? 0 : length;
}

static int is_next(const struct nsn_interest *interest, size_t length, uint64_t settled)
{
    return interest->packet.magic == NSN_PROTOCOL_MAGIC && interest->packet.type == NSN_INTEREST &&
           interest->sequence == settled + 1 && interest->length == length - sizeof *interest;
}

int nsn_serve_interest(struct nsn_log_writer *writer, struct nsn_slots *slots, uint32_t slot, uint32_t generation,
                       uint64_t *settled, int fd, int most, uint64_t spin_ns)
{
    static _Thread_local union {
        struct nsn_interest interest;
        uint8_t bytes[NSN_PACKET_MAX];
    } packet;
    int served = 0;
    uint64_t until = 0;
    while (served < most) {
        ssize_t length = peek(fd, packet.bytes, sizeof packet.bytes);
        if (length < 0 && served && spin_ns) {
            uint64_t now = nsn_now_ns();
            if (until && now > until)
                break;
            until = until ? until : now + spin_ns;
            nsn_cpu_relax();
            continue;
        }
        uint32_t failed;
        if (length <= 0 || !is_next(&packet.interest, (size_t)length, *settled) ||
            nsn_log_writer_apply(writer, slot, generation, packet.bytes + sizeof packet.interest, packet.interest.length,
                                 packet.interest.count, &failed) < 0)
            break; /* applied in part at most: the long way skips what is there already, and finds the same fault */
        nsn_slots_acknowledge(slots, slot, ++*settled);
        recv(fd, packet.bytes, sizeof packet.bytes, MSG_DONTWAIT);
        served++;
        until = 0;
    }
    return served;
}
