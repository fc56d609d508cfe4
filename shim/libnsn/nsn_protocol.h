/* The control protocol between a session and nsnd: SOCK_SEQPACKET on a Unix socket, one packet one message, structs as
 * they stand here (little-endian, natural alignment), descriptors by SCM_RIGHTS (at most one a packet).
 *
 *   session -> nsnd   HELLO, CREDENTIALS, INTEREST, LINK, SEGMENT, TAKEN, PING, GOODBYE; STATUS and OPEN from whoever
 *                     says no HELLO
 *   nsnd -> session   CHALLENGE, RELAYED, WELCOME, REFUSED, INTEREST_DONE, LINK, SEGMENT, PEER_GONE, PONG, LAME_DUCK, STATUS,
 *                     OPENED
 *
 * Where the application ID has users, HELLO is answered by CHALLENGE, and that by CREDENTIALS; then comes WELCOME, RELAYED or
 * REFUSED. Elsewhere HELLO is answered by WELCOME or REFUSED at once.
 *
 * Descriptors are sent to a session one at a time: the next when it has answered TAKEN, because descriptors queued to one
 * stopped process count against every process of that user.
 */
#ifndef NSN_PROTOCOL_H
#define NSN_PROTOCOL_H

#include <stdint.h>

#define NSN_PROTOCOL_MAGIC 0x494e534eu /* "NSNI" */
#define NSN_PROTOCOL_VERSION 1         /* of the packets, and of what lies in shared memory */
/* Everybody speaks the previous one too, so that nsnd and programs can be upgraded one after the other. */
#define NSN_PROTOCOL_VERSION_MIN (NSN_PROTOCOL_VERSION > 1 ? NSN_PROTOCOL_VERSION - 1 : 1)
#define NSN_PACKET_MAX 32768

enum nsn_packet_type {
    NSN_HELLO = 1,
    NSN_WELCOME = 2,
    NSN_REFUSED = 3,
    NSN_INTEREST = 4,
    NSN_INTEREST_DONE = 5,
    NSN_LINK = 6,
    NSN_SEGMENT = 7,
    NSN_TAKEN = 8,
    NSN_PEER_GONE = 9,
    NSN_PING = 10,
    NSN_PONG = 11,
    NSN_GOODBYE = 12,
    NSN_LAME_DUCK = 13,
    NSN_STATUS = 14, /* request: header only. Answer: header, then a msgpack map; larger ones in several packets, the last
                        with `last` = 1 in struct nsn_status */
    NSN_OPEN = 15,   /* have nsnd serve an application ID before there is a session; answered by OPENED or REFUSED */
    NSN_OPENED = 16,
    NSN_CHALLENGE = 17,
    NSN_CREDENTIALS = 18,
    NSN_RELAYED = 19,  /* header only, with the descriptor of a stream socket at whose other end a relay speaks NATS's client
                          protocol: for the sessions of users with permissions, in place of a WELCOME */
};

struct nsn_packet { /* at the front of every packet */
    uint32_t magic;
    uint16_t type;
    uint16_t version; /* of the protocol spoken, as the WELCOME says; in HELLO the highest the session speaks */
};

struct nsn_hello {
    struct nsn_packet packet;
    uint32_t application_id;
    uint32_t version_min;      /* lowest protocol version the session speaks */
    uint64_t identity[2];      /* random; the same in every HELLO of this session */
    uint32_t slot;             /* when it reattaches: its slot and generation; else UINT32_MAX and 0 */
    uint32_t generation;
    uint64_t acknowledged;     /* highest interest sequence it knows to be in the log */
    char name[128];            /* NUL-terminated */
    int32_t segment;           /* number of the segment with its place (nsn_place.h), when its user is not nsnd's; else -1 */
    uint32_t flags;            /* enum nsn_hello_flags; 0 of sessions from before there were any */
};

enum nsn_hello_flags {
    NSN_HELLO_ANSWERS = 1, /* it answers a CHALLENGE; who does not is refused where there would be one */
    NSN_HELLO_RELAY = 2,   /* it was relayed before, and has to be again, whatever its user may do by now */
};

struct nsn_challenge {
    struct nsn_packet packet;
    char nonce[64];            /* to be signed by who has an nkey; empty where nobody has. NUL-terminated */
};

struct nsn_credentials {       /* then the JSON object that a NATS client sends behind CONNECT: user, pass, auth_token, nkey and
                                  sig are looked at */
    struct nsn_packet packet;
    uint32_t length;           /* bytes that follow this struct */
    uint32_t reserved;
};

struct nsn_welcome {
    struct nsn_packet packet;
    uint32_t slot;
    uint32_t generation;
    uint64_t client_id;        /* NATS's client_id: unique in this node's life */
    uint64_t max_payload;      /* bytes */
    uint64_t acknowledged;     /* highest interest sequence of this session in the log: what came later must be sent again */
    uint32_t reattached;       /* 1: same slot and generation as before. 0: new slot; links and interest are gone */
    uint32_t reserved;
    char directory[256];       /* of the application's files: slots, log.N, bell.SLOT; NUL-terminated */
    char version[32];          /* nsnd's version */
};

struct nsn_refused {           /* the connection ends behind it */
    struct nsn_packet packet;
    int32_t error;             /* positive errno: EPROTONOSUPPORT, EACCES, ENOSPC, EINVAL …; EKEYREJECTED: the credentials
                                  are nobody's, or nobody's any more */
    uint32_t reserved;
    char text[496];            /* what and why and the way out; NUL-terminated */
};

struct nsn_interest {          /* then `count` struct nsn_interest_change, back to back, each padded to 8 bytes */
    struct nsn_packet packet;
    uint64_t sequence;         /* 1, 2, …; of this packet. Repeated after a reattachment: nsnd skips what it has */
    uint32_t count;
    uint32_t length;           /* bytes that follow this struct */
};

enum nsn_interest_op { NSN_INTEREST_ADD = 1, NSN_INTEREST_REMOVE = 2 };

struct nsn_interest_change {   /* then pattern, then queue */
    uint8_t op;
    uint8_t reserved;
    uint16_t pattern_length;   /* 0 for REMOVE */
    uint16_t queue_length;     /* 0: plain subscription */
    uint16_t reserved2;
    uint32_t sid;
    uint32_t reserved3;
};

struct nsn_interest_done {     /* nsnd writes slot.acknowledged first, then sends this */
    struct nsn_packet packet;
    uint64_t sequence;         /* this and all before it are in the log */
    int32_t error;             /* 0, or a negative errno: change number `failed` was not applied, nor what stood behind it */
    uint32_t failed;
};

struct nsn_link_packet {       /* NSN_LINK, with the link's memfd */
    struct nsn_packet packet;
    uint32_t peer_slot;        /* to nsnd: the consumer. From nsnd: the producer */
    uint32_t peer_generation;
    uint64_t link_id;          /* given by the producer, unique in its life: a second hand-over is recognised by it */
    uint32_t peer_uid;         /* from nsnd: the producer's user, as the kernel says (SO_PEERCRED). To nsnd: 0 */
    uint32_t reserved;
};

struct nsn_segment_packet {    /* NSN_SEGMENT, with a pool segment's memfd; between sessions of one user alone */
    struct nsn_packet packet;
    uint32_t peer_slot;        /* as in nsn_link_packet */
    uint32_t peer_generation;
    uint32_t segment;          /* number in the producer's life */
    uint32_t reserved;
    uint64_t size;             /* bytes */
};

struct nsn_peer_gone {         /* a session has ended that this one was linked with, in either direction, or that is an other
                                  (nsn_slots.h), whose place everybody has */
    struct nsn_packet packet;
    uint32_t peer_slot;
    uint32_t peer_generation;
};

struct nsn_ping {              /* NSN_PING and its NSN_PONG */
    struct nsn_packet packet;
    uint64_t token;
};

struct nsn_status {
    struct nsn_packet packet;
    uint32_t length;           /* bytes of msgpack that follow */
    uint32_t last;
};

struct nsn_open {              /* NSN_OPEN and its NSN_OPENED */
    struct nsn_packet packet;
    uint32_t application_id;
    uint32_t reserved;
};

#endif
