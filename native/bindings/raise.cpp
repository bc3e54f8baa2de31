#include "bindings/raise.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <set>
#include <system_error>

namespace kvt::bindings {

using protocol::Cause;

namespace {

nb::object key_object(const engine::TransferHandle& handle) {
    if (handle.key_is_text) {
        return nb::str(handle.key.data(), handle.key.size());
    }
    return nb::bytes(handle.key.data(), handle.key.size());
}

std::string shown_key(const engine::TransferHandle& handle) {
    const bool source = handle.role == protocol::Role::source;
    if (handle.use != nullptr) {  // who has the whole token may use it: not in messages
        return (source ? "write to grant " : "read of grant ") + handle.key.substr(0, 6) + "...";
    }
    return (source ? "send '" : "receive '") + shown(handle.key) + "'";
}

constexpr const char* kDenied =
    "not granted: the token is unknown to the peer, has ended, is for another, or hasn't these blocks; "
    "compute "
    "them again";
constexpr const char* kStale =
    "the grant has ended (read, revoked, reused or expired); compute the blocks again";

// The reason of a loss starts with its cause: "reset: ...", "heartbeat: ...".
std::pair<std::string, std::string> split_reason(const std::string& reason) {
    const auto colon = reason.find(": ");
    if (colon == std::string::npos) {
        return {"reset", reason};
    }
    return {reason.substr(0, colon), reason.substr(colon + 2)};
}

nb::dict blocks_of(const engine::Result& result) {
    nb::dict groups;
    for (const auto& group : result.block_outcomes) {
        nb::dict states;
        for (const std::uint32_t id : group.sealed) {
            states[nb::int_(id)] = "sealed";
        }
        for (const std::uint32_t id : group.poisoned) {
            states[nb::int_(id)] = "poisoned";
        }
        groups[nb::str(group.group.data(), group.group.size())] = states;
    }
    return groups;
}

bool retryable(Cause cause) noexcept {
    switch (cause) {
        case Cause::layout_mismatch:
        case Cause::connection_closed:
        case Cause::protocol_error:
        case Cause::grant_denied:
        case Cause::grant_stale:
        case Cause::resource_limit: return false;
        default: return true;
    }
}

std::string corrupt_blocks(const engine::Result& result) {
    std::string text;
    std::set<std::pair<std::string, std::uint32_t>> named;
    for (const auto& group : result.corrupt) {
        for (const std::uint32_t id : group.ids) {
            if (!named.emplace(group.group, id).second) {
                continue;  // several of its ranges were corrupt
            }
            if (named.size() > 16) {
                return text + ", ...";
            }
            text += (named.size() > 1 ? ", " : "") + std::to_string(id);
        }
    }
    return text;
}

std::string timeout_text(const engine::TransferHandle& handle) {
    const auto seconds = [](protocol::Time ns) {
        return std::to_string(static_cast<double>(ns) / 1e9).substr(0, 6) + " s";
    };
    switch (handle.result.outcome.cause) {
        case Cause::timeout_match:
            return "the other side did not post this key within match_timeout_s=" +
                   seconds(handle.limits.match);
        case Cause::timeout_gate:
            return "the source's layer gate stayed shut for match_timeout_s=" + seconds(handle.limits.match);
        case Cause::timeout_bytes: return "no byte moved for stall_timeout_s=" + seconds(handle.limits.stall);
        default: return "not done within timeout_s=" + seconds(handle.limits.total);
    }
}

std::string mismatch_text(const protocol::Mismatch& mismatch) {
    return shown(mismatch.path) + ": theirs " + shown(mismatch.theirs) + ", ours " + shown(mismatch.ours);
}

// What ends everything on a connection at once.
std::string loss_text(const protocol::Outcome& outcome) {
    const std::string reason = shown(outcome.reason);
    switch (outcome.cause) {
        case Cause::peer_lost: return "the connection was lost (" + reason + ")";
        case Cause::protocol_error: return "the peer broke the protocol: " + reason;
        default: return reason;
    }
}

std::string text_of(const engine::TransferHandle& handle) {
    const protocol::Outcome& outcome = handle.result.outcome;
    const std::string reason = shown(outcome.reason);
    switch (outcome.cause) {
        case Cause::cancelled: return reason.empty() ? "cancelled here" : reason;
        case Cause::timeout_match:
        case Cause::timeout_gate:
        case Cause::timeout_bytes:
        case Cause::timeout_total: return timeout_text(handle);
        case Cause::peer_aborted: return "the peer ended it: " + reason;
        case Cause::integrity:
            return "the digest of what landed doesn't agree with what was sent, in block ids " +
                   corrupt_blocks(handle.result) +
                   "; post these again, and look at memory or network hardware";
        case Cause::layout_mismatch: return mismatch_text(outcome.mismatch);
        case Cause::grant_denied: return kDenied;
        case Cause::grant_stale: return kStale;
        default: return loss_text(outcome);
    }
}

const char* waiting_for(Cause cause) {
    switch (cause) {
        case Cause::timeout_match: return "match";
        case Cause::timeout_gate: return "gate";
        case Cause::timeout_bytes: return "bytes";
        default: return "total";
    }
}

void add_class_attributes(nb::dict& attributes, const engine::Result& result) {
    const protocol::Outcome& outcome = result.outcome;
    switch (outcome.cause) {
        case Cause::timeout_match:
        case Cause::timeout_gate:
        case Cause::timeout_bytes:
        case Cause::timeout_total: attributes["waiting_for"] = waiting_for(outcome.cause); break;
        case Cause::peer_aborted: attributes["reason"] = shown(outcome.reason); break;
        case Cause::layout_mismatch:
            attributes["path"] = shown(outcome.mismatch.path);
            attributes["ours"] = shown(outcome.mismatch.ours);
            attributes["theirs"] = shown(outcome.mismatch.theirs);
            break;
        case Cause::peer_lost: attributes["cause"] = shown(split_reason(outcome.reason).first); break;
        default: break;
    }
}

/// As kvtransport.new_token() writes it: base64, with - and _, without padding.
nb::str token_text(const protocol::Token& token) {
    constexpr const char* kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    std::string text;
    unsigned bits = 0, have = 0;
    for (const std::byte byte : token) {
        bits = bits << 8 | std::to_integer<unsigned>(byte);
        for (have += 8; have >= 6; have -= 6) {
            text += kDigits[bits >> (have - 6) & 63];
        }
    }
    text += kDigits[bits << (6 - have) & 63];
    return nb::str(text.data(), text.size());
}

nb::dict attributes_of(const protocol::Outcome& outcome, const engine::Connection& connection) {
    nb::dict attributes;
    attributes["peer"] = connection.label();
    attributes["backend"] = connection.backend();
    attributes["quiesced"] = true;
    attributes["retryable"] = retryable(outcome.cause);
    attributes["delivered"] = outcome.delivered == protocol::Delivered::unknown
                                  ? nb::none()
                                  : nb::object(nb::bool_(false));
    return attributes;
}

}  // namespace

std::string shown(const std::string& raw) {
    constexpr const char* kHex = "0123456789abcdef";
    const nb::object valid = nb::steal(
        PyUnicode_DecodeUTF8(raw.data(), static_cast<Py_ssize_t>(raw.size()), "backslashreplace"));
    if (!valid.is_valid()) {
        throw nb::python_error();
    }
    const auto utf8 = nb::cast<std::string>(valid);
    std::string text;
    const auto add_hex = [&text](unsigned char byte) {
        text += "\\x";
        text += kHex[byte >> 4];
        text += kHex[byte & 15];
    };
    for (std::size_t i = 0; i < utf8.size(); ++i) {
        const auto byte = static_cast<unsigned char>(utf8[i]);
        const auto next = static_cast<unsigned char>(i + 1 < utf8.size() ? utf8[i + 1] : 0);
        if (byte < 0x20 || byte == 0x7f) {
            add_hex(byte);
        } else if (byte == 0xc2 && next < 0xa0) {  // U+0080 to U+009F, which some terminals obey, too
            add_hex(next);
            ++i;
        } else {
            text += utf8[i];
        }
    }
    return text;
}

const char* class_of(Cause cause) noexcept {
    switch (cause) {
        case Cause::cancelled: return "TransferCancelled";
        case Cause::timeout_match:
        case Cause::timeout_gate:
        case Cause::timeout_bytes:
        case Cause::timeout_total: return "TransferTimeout";
        case Cause::peer_aborted: return "PeerAborted";
        case Cause::integrity: return "IntegrityError";
        case Cause::layout_mismatch: return "LayoutMismatch";
        case Cause::peer_lost: return "PeerLost";
        case Cause::connection_closed: return "ConnectionClosed";
        case Cause::protocol_error: return "RemoteProtocolError";
        case Cause::resource_limit: return "ResourceLimit";
        case Cause::grant_denied: return "PermissionDenied";
        case Cause::grant_stale: return "StaleGrant";
        case Cause::ok: break;
    }
    return "KVTransportError";
}

nb::object make_error(const char* cls, const std::string& message, nb::dict attributes) {
    const nb::object type = nb::module_::import_("kvtransport.errors").attr(cls);
    const std::string text = shown(message);
    const nb::tuple arguments = nb::make_tuple(nb::str(text.data(), text.size()));
    PyObject* const made = in_python(
        [&] { return PyObject_Call(type.ptr(), arguments.ptr(), attributes.ptr()); });
    if (made == nullptr) {
        throw nb::python_error();
    }
    return nb::steal(made);
}

void raise(const char* cls, const std::string& message, nb::dict attributes) {
    const nb::object error = make_error(cls, message, std::move(attributes));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    throw nb::python_error();
}

nb::object error_of(const engine::TransferHandle& handle) {
    const engine::Result& result = handle.result;
    nb::dict attributes = attributes_of(result.outcome, *handle.connection());
    attributes["key"] = key_object(handle);
    attributes["blocks"] = blocks_of(result);
    attributes["backend"] = result.backend;
    if (handle.role == protocol::Role::destination) {
        nb::del(attributes["delivered"]);
    }
    add_class_attributes(attributes, result);
    return make_error(class_of(result.outcome.cause), shown_key(handle) + ": " + text_of(handle), attributes);
}

nb::object error_of(const engine::MessageHandle& handle) {
    if (handle.after && handle.after->result.outcome.cause != Cause::ok) {
        return error_of(*handle.after);
    }
    nb::dict attributes = attributes_of(handle.result.outcome, *handle.connection());
    add_class_attributes(attributes, handle.result);
    return make_error(class_of(handle.result.outcome.cause), "message: " + loss_text(handle.result.outcome),
                      attributes);
}

nb::object error_of(const engine::GrantHandle& handle) {
    const protocol::Outcome& outcome = handle.result.outcome;
    nb::dict attributes;
    attributes["key"] = token_text(handle.token);
    attributes["quiesced"] = true;
    attributes["delivered"] = false;
    add_class_attributes(attributes, handle.result);
    return make_error(class_of(outcome.cause), "grant: " + loss_text(outcome), attributes);
}

nb::object error_of(const engine::LeaseHandle& handle) {
    const protocol::Outcome& outcome = handle.result.outcome;
    nb::dict attributes = attributes_of(outcome, *handle.connection());
    attributes["key"] = token_text(handle.token);
    add_class_attributes(attributes, handle.result);
    const std::string text = outcome.cause == Cause::grant_denied  ? kDenied
                             : outcome.cause == Cause::grant_stale ? kStale
                                                                   : loss_text(outcome);
    return make_error(class_of(outcome.cause), "lease: " + text, attributes);
}

void rethrow() {
    try {
        throw;
    } catch (const engine::NotUsable& lost) {
        nb::dict attributes;
        switch (lost.cause) {
            case Cause::connection_closed: raise("ConnectionClosed", lost.what());
            case Cause::protocol_error:
                raise("RemoteProtocolError",
                      std::string("the connection was closed: the peer broke the protocol: ") + lost.what());
            case Cause::resource_limit: raise("ResourceLimit", lost.what());
            default:
                attributes["cause"] = shown(split_reason(lost.what()).first);
                raise("PeerLost", std::string("the connection is lost (") + lost.what() + "); connect again",
                      attributes);
        }
    } catch (const protocol::LocalViolation& forbidden) {
        raise("LocalProtocolError", forbidden.what());
    } catch (const protocol::Excess& excess) {
        raise("ResourceLimit", excess.what());
    } catch (const std::invalid_argument& misuse) {
        throw nb::value_error(shown(misuse.what()).c_str());
    } catch (const std::out_of_range& misuse) {
        throw nb::value_error(shown(misuse.what()).c_str());
    } catch (const std::length_error& misuse) {
        throw nb::value_error(shown(misuse.what()).c_str());
    } catch (const std::system_error& error) {
        const bool descriptors = error.code() == std::errc::too_many_files_open ||
                                 error.code() == std::errc::too_many_files_open_in_system;
        raise("ResourceLimit",
              std::string(error.what()) + (descriptors ? "; raise the limit (ulimit -n)" : ""));
    }
}

void require_alive(const engine::Engine& engine) {
    if (engine.forked()) {
        raise("ForkedProcessError",
              "this process is a fork of the one that made the Endpoint: make a new Endpoint here");
    }
}

void require_own(std::uint64_t generation) {
    if (generation != fork_generation()) {
        raise("ForkedProcessError",
              "this process is a fork of the one that made this: make a new one here, of a new Endpoint");
    }
}

void require_open(const engine::Engine& engine) {
    require_alive(engine);
    if (engine.closed()) {
        raise("ConnectionClosed", "the endpoint is closed");
    }
}

}  // namespace kvt::bindings
