#include "protocol/frame_stream.hpp"

#include <cstring>

namespace kvt::protocol {

std::span<std::byte> FrameReader::room() {
    const std::size_t nbytes = front_nbytes_ + kRoomNbytes;
    if (begin_ == end_) {
        begin_ = end_ = 0;
    } else if (begin_ > 0 && buffer_.size() - begin_ < nbytes) {
        std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
        end_ -= begin_;
        begin_ = 0;
    }
    if (buffer_.size() - begin_ < nbytes) {
        buffer_.resize(nbytes);  // begin_ is 0
    }
    return std::span(buffer_).subspan(end_);
}

std::optional<ControlFrame> FrameReader::next() {
    const std::size_t have = end_ - begin_;
    if (have == 0 && buffer_.size() > 2 * kRoomNbytes) {
        buffer_ = Bytes();  // a large frame has passed: an idle connection holds no megabyte
        begin_ = end_ = 0;
    }
    if (have < front_nbytes_) {
        return std::nullopt;
    }
    const auto bytes = std::span<const std::byte>(buffer_).subspan(begin_, have);
    const Header header = decode_header(bytes.first<kHeaderNbytes>(), false);
    const bool chunk = header.type == FrameType::chunk;
    const std::size_t nbytes = kHeaderNbytes + header.body_nbytes + (chunk ? kTrailerNbytes : 0);
    if (have < nbytes) {
        front_nbytes_ = nbytes;
        return std::nullopt;
    }
    ControlFrame frame{header, bytes.subspan(kHeaderNbytes, header.body_nbytes), std::nullopt};
    if (chunk) {
        frame.trailer = decode_trailer(bytes.subspan(nbytes - kTrailerNbytes).first<kTrailerNbytes>());
    }
    begin_ += nbytes;
    front_nbytes_ = kHeaderNbytes;
    return frame;
}

}  // namespace kvt::protocol
